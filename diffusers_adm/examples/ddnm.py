"""Super-resolution without training by DDNM (Wang et al. 2022, arXiv 2212.00490).

At each step, the predicted x_0 is corrected so that it shrinks exactly to the small image.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows, true_digits


def shrink(x: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Applies the operator A, which averages each square of pixels."""
    return F.avg_pool2d(x, factor)


def enlarge(y: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Applies the pseudo-inverse of A, which repeats each pixel."""
    return F.interpolate(y, scale_factor=factor, mode="nearest")


def agreeing_with(small: torch.Tensor, factor: int = 4) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    Returns an `x_0_fn` that changes the predicted x_0 so that it agrees with small images.

    Args:
        small: Images in [-1, 1], `(batch, channels, height / factor, width / factor)`.
        factor: Factor by which the images are enlarged.
    """

    def agree(x_0: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x_0 - enlarge(shrink(x_0, factor) - small, factor)

    return agree


def super_resolve(pipeline, small: torch.Tensor, steps: int, **call) -> torch.Tensor:
    """
    Draws large images that shrink to given small images.

    Args:
        pipeline: Pipeline with DDIM.
        small: Images of 8x8 pixels in [-1, 1].
        steps: Number of DDIM steps.
        call: Other arguments of `draw`.
    """
    return draw(pipeline, len(small), num_inference_steps=steps, eta=0.85, x_0_fn=agreeing_with(small), **call)


def main() -> None:
    """Enlarges small digits, and writes a picture of them."""
    args = parse_arguments("ddnm", __doc__)
    pipeline, whole = quiet_pipeline(ddim=True), true_digits(args.digits)
    small = shrink(whole)
    drawn = super_resolve(pipeline, small, args.steps)
    print(f"Mean absolute error after shrinking: {(shrink(drawn) - small).abs().mean():.4f}")
    save_rows(pipeline, {"whole": whole, "8x8 pixels": enlarge(small), "enlarged": drawn}, args.output)


if __name__ == "__main__":
    sys.exit(run_command("ddnm", main))
