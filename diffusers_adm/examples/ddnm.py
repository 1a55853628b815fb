"""Super-resolution without training by DDNM (Wang et al. 2022, arXiv 2212.00490).

At each step, the predicted x_0 is corrected so that it shrinks exactly to the small image.
"""

import torch
import torch.nn.functional as F

from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows, true_digits


def shrink(x: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Applies the operator A, which averages each square of pixels."""
    return F.avg_pool2d(x, factor)


def enlarge(y: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Applies the pseudo-inverse of A, which repeats each pixel."""
    return F.interpolate(y, scale_factor=factor, mode="nearest")


def super_resolve(pipeline, small: torch.Tensor, steps: int, **call) -> torch.Tensor:
    """
    Draws large images that shrink to given small images.

    Args:
        pipeline: Pipeline with DDIM.
        small: Images of 8x8 pixels in [-1, 1].
        steps: Number of DDIM steps.
        call: Other arguments of `draw`.
    """

    def agree(x_0: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x_0 - enlarge(shrink(x_0) - small)

    return draw(pipeline, len(small), num_inference_steps=steps, eta=0.85, x_0_fn=agree, **call)


if __name__ == "__main__":
    args = parse_arguments(__doc__, steps=50)
    pipeline, whole = quiet_pipeline(ddim=True), true_digits(args.digits)
    small = shrink(whole)
    drawn = super_resolve(pipeline, small, args.steps)
    print(f"Mean absolute error after shrinking: {(shrink(drawn) - small).abs().mean():.4f}")
    save_rows(pipeline, {"whole": whole, "8x8 pixels": enlarge(small), "enlarged": drawn}, args.output)
