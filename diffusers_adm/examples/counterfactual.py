"""Counterfactuals: each 3 becomes the 8 that resembles it most, by inversion and guidance (Wolleb et al. 2022, arXiv 2203.04306).

DDIM in reverse noises each digit up to a timestep in the middle. From there, it is drawn as another digit, guided by the classifier.
"""

import sys

import torch

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows


def as_another_class(
    pipeline, images: torch.Tensor, label: int, target: int, steps: int, until: int = 600, **call
) -> torch.Tensor:
    """
    Draws images as another class.

    Args:
        pipeline: Pipeline with DDIM.
        images: Images in [-1, 1].
        label: Class of the images.
        target: Class to draw.
        steps: Number of steps of the whole schedule.
        until: Timestep up to which the images are noised. A higher timestep changes more.
        call: Other arguments of `draw`.
    """
    count = len(images)
    x_t = pipeline.invert(images, [label] * count, steps, until=until)
    call = {"class_labels": [target] * count, "guidance_scale": 2.0, **call}
    return draw(pipeline, count, latents=x_t, start=until, num_inference_steps=steps, **call)


def main() -> None:
    """Turns each 3 into an 8, and writes a picture of them."""
    args = parse_arguments("counterfactual", __doc__, least_steps=2)
    pipeline, count = quiet_pipeline(ddim=True), args.digits
    threes, eights = (
        draw(pipeline, count, seed, class_labels=[label] * count, num_inference_steps=25, guidance_scale=1.0)
        for label, seed in ((3, 100), (8, 200))
    )
    changed = as_another_class(pipeline, threes, 3, 8, args.steps)
    distances = [(digits - threes).abs().mean().item() for digits in (changed, eights)]
    print(f"Mean absolute difference from the 3: {distances[0]:.3f}, and {distances[1]:.3f} for any other 8")
    save_rows(pipeline, {"3": threes, "as an 8": changed}, args.output)


if __name__ == "__main__":
    sys.exit(run_command("counterfactual", main))
