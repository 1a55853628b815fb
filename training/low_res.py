"""Small images, which an upsampler is given beside the noised ones."""

import torch
import torch.nn.functional as F

from diffusers_adm.training.options import UpsamplerOptions


def shrink(image: torch.Tensor, size: int) -> torch.Tensor:
    """Shrinks images, `(batch, channels, height, width)`, to `size` x `size` pixels by averaging."""
    return F.interpolate(image, (size, size), mode="area")


def draw_low_res(image: torch.Tensor, options: UpsamplerOptions) -> torch.Tensor:
    """
    Returns the small images of training images, with noise of a random standard deviation per image.

    Args:
        image: Training images, `(batch, channels, height, width)` in [-1, 1].
        options: Size of the small images, and the largest standard deviation.
    """
    low_res = shrink(image, options.low_resolution)  # (batch, channels, low_resolution, low_resolution)
    if not options.low_res_noise:
        return low_res
    deviation = options.low_res_noise * torch.rand_like(low_res[:, :1, :1, :1])  # (batch, 1, 1, 1)
    return low_res + deviation * torch.randn_like(low_res)
