"""Printed digits become handwritten ones by SDEdit (Meng et al. 2022, arXiv 2108.01073): they are noised in part and drawn again."""

import sys

from PIL import Image, ImageDraw, ImageFont

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows
from diffusers_adm.pipelines.images import model_images


STRENGTHS = (0.4, 0.6, 0.8)


def printed_digits(count: int) -> list[Image.Image]:
    """Returns pictures of the digits 0, 1, ... in a font."""
    pictures, font = [], ImageFont.load_default(size=28)
    for digit in range(count):
        picture = Image.new("L", (32, 32))
        ImageDraw.Draw(picture).text((16, 16), str(digit), 255, font, anchor="mm")
        pictures.append(picture)
    return pictures


def main() -> None:
    """Draws printed digits by hand, and writes a picture of them."""
    args = parse_arguments("sdedit", __doc__, least_steps=3)
    pipeline, printed = quiet_pipeline(ddim=True), printed_digits(args.digits)
    rows = {"printed": model_images(printed, channels=1)}
    for strength in STRENGTHS:
        call = {"image": printed, "strength": strength, "guidance_scale": 1.0}
        drawn = draw(pipeline, args.digits, num_inference_steps=args.steps, **call)
        difference = (drawn - rows["printed"]).abs().mean()
        print(f"Mean absolute difference from the printed digits at strength {strength}: {difference:.3f}")
        rows[f"strength {strength}"] = drawn
    save_rows(pipeline, rows, args.output)


if __name__ == "__main__":
    sys.exit(run_command("sdedit", main))
