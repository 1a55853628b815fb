"""Deblurring by DPS (Chung et al. 2022, arXiv 2209.14687): digits are restored from blurred and noisy measurements.

After each step, the image is corrected by the gradient of the error of the predicted x_0, which goes through the UNet (Algorithm 1).
"""

import sys

import torch
from torchvision.transforms.functional import gaussian_blur

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows, true_digits


def blur(x: torch.Tensor) -> torch.Tensor:
    """Applies the operator A, a Gaussian blur."""
    return gaussian_blur(x, kernel_size=9, sigma=3.0)


def restore(pipeline, measured: torch.Tensor, steps: int, step_size: float = 1.0, **call) -> torch.Tensor:
    """
    Draws images that agree with measurements.

    Args:
        pipeline: Pipeline with DDPM.
        measured: Blurred and noisy images.
        steps: Number of DDPM steps.
        step_size: Factor zeta of each correction.
        call: Other arguments of `draw`.
    """
    x_t = None

    def remember(pipe, step, timestep, tensors):
        nonlocal x_t
        x_t = tensors["latents"].clone()
        return tensors

    def correct(pipe, step, timestep, tensors):
        with torch.enable_grad():
            sample = x_t.requires_grad_()
            x_0 = pipe.predict(sample, int(timestep), list(range(len(sample)))).x_0_clipped
            error = torch.linalg.vector_norm((measured - blur(x_0)).flatten(1), dim=1)  # (batch,)
            (gradient,) = torch.autograd.grad(error.sum(), sample)
        return {"latents": tensors["latents"] - step_size * gradient}

    hooks = {"callback_on_step_start": remember, "callback_on_step_end": correct}
    return draw(pipeline, len(measured), num_inference_steps=steps, **hooks, **call)


def main() -> None:
    """Restores blurred digits, and writes a picture of them."""
    args = parse_arguments("dps", __doc__, steps=100)
    pipeline, whole = quiet_pipeline(), true_digits(args.digits)
    measured = blur(whole) + 0.05 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    drawn = restore(pipeline, measured, args.steps)
    print(
        f"Mean absolute error: {(measured - whole).abs().mean():.4f} before, {(drawn - whole).abs().mean():.4f} after restoration"
    )
    save_rows(pipeline, {"whole": whole, "measured": measured.clamp(-1, 1), "restored": drawn}, args.output)


if __name__ == "__main__":
    sys.exit(run_command("dps", main))
