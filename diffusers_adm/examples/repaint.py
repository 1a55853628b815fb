"""Inpainting by RePaint (Lugmayr et al. 2022, arXiv 2201.09865): the lower half of each digit is drawn again."""

import sys
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.command_line import run_command
from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows, true_digits


def jumping_timesteps(steps: int, jump_length: int, jump_count: int, num_train_timesteps: int = 1000) -> list[int]:
    """
    Returns descending timesteps. After every `jump_length` steps, they jump back up by as many steps, `jump_count` - 1 times.

    Raises:
        ValueError: If there are more steps than timesteps.
    """
    if steps > num_train_timesteps:
        raise ValueError(f"--steps must be at most {num_train_timesteps}, but got {steps}.")
    indices, index, jumps_left = [], steps - 1, {}
    while index >= 0:
        indices.append(index)
        place = index - 1  # index after the step
        if place >= 0 and place % jump_length == 0 and place + jump_length < steps:
            if jumps_left.setdefault(place, jump_count - 1) > 0:
                jumps_left[place] -= 1
                index = place + jump_length
                continue
        index = place
    return [index * num_train_timesteps // steps for index in indices]


def pasting(pipeline, known: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> Callable:
    """
    Returns a callback that replaces the known part of x_t before each step by the known pixels with noise.

    Args:
        pipeline: Pipeline that draws.
        known: Images in [-1, 1].
        mask: Mask that broadcasts to `known`: 1 where pixels are known, 0 where they are drawn.
        generator: Generator of the noise.
    """
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config)

    def paste(pipe, step, timestep, tensors):
        noise = randn_tensor(known.shape, generator=generator, device=known.device)
        noised = add_noise(schedule, known, int(timestep), noise)
        return {"latents": mask * noised + (1 - mask) * tensors["latents"]}

    return paste


def inpaint(pipeline, known: torch.Tensor, mask: torch.Tensor, timesteps: list[int], **call) -> torch.Tensor:
    """
    Draws the unknown part of images.

    Args:
        pipeline: Pipeline with DDPM.
        known: Images in [-1, 1].
        mask: Mask that broadcasts to `known`: 1 where pixels are known, 0 where they are drawn.
        timesteps: Timesteps to visit, in order.
        call: Other arguments of `draw`.
    """
    paste = pasting(pipeline, known, mask, torch.Generator().manual_seed(0))
    drawn = draw(pipeline, len(known), timesteps=timesteps, callback_on_step_start=paste, **call)
    return mask * known + (1 - mask) * drawn


def main() -> None:
    """Inpaints the lower half of digits, and writes a picture of them."""
    args = parse_arguments("repaint", __doc__)
    pipeline, known = quiet_pipeline(), true_digits(args.digits)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16, :] = 1
    timesteps = jumping_timesteps(args.steps, jump_length=10, jump_count=5)
    print(f"Evaluations of the UNet: {len(timesteps)}")
    masked = mask * known - (1 - mask)
    rows = {"whole": known, "known": masked, "inpainted": inpaint(pipeline, known, mask, timesteps)}
    save_rows(pipeline, rows, args.output)


if __name__ == "__main__":
    sys.exit(run_command("repaint", main))
