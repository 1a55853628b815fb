"""Guidance by a custom function, towards digits that equal their mirror images."""

import sys

import torch

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows


def symmetric(
    x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """Returns a log-probability per image, `(batch,)`, which is highest if the predicted x_0 equals its mirror image."""
    return -(x_0 - x_0.flip(-1)).square().sum(dim=(1, 2, 3))


symmetric.through_unet = True  # x_0 depends on x_t


def asymmetry(images: torch.Tensor) -> float:
    """Returns the mean absolute difference between images and their mirror images."""
    return (images - images.flip(-1)).abs().mean().item()


def main() -> None:
    """Draws symmetric digits, and writes a picture of them."""
    args = parse_arguments("symmetry", __doc__)
    pipeline = quiet_pipeline(ddim=True)
    plain = draw(pipeline, args.digits, num_inference_steps=args.steps)
    guided = draw(pipeline, args.digits, num_inference_steps=args.steps, guidance_fn=symmetric, guidance_scale=0.03)
    print(
        f"Mean absolute difference from the mirror image: {asymmetry(plain):.3f} unguided, {asymmetry(guided):.3f} guided"
    )
    save_rows(pipeline, {"unguided": plain, "symmetric": guided}, args.output)


if __name__ == "__main__":
    sys.exit(run_command("symmetry", main))
