"""Images of the caller of a pipeline, as the input of a UNet."""

import os

import numpy as np
import torch
from diffusers.utils import load_image
from PIL import Image

from diffusers_adm.data.image_modes import is_deep, to_mode


PipelineImage = Image.Image | str | os.PathLike | np.ndarray | torch.Tensor


def model_images(image: PipelineImage | list[PipelineImage], channels: int) -> torch.Tensor:
    """
    Converts images to the input of a UNet, `(batch, channels, height, width)` in [-1, 1], float32. Gradients flow through it.

    Args:
        image: One image, or a list of images. They may be PIL images, paths or URLs, arrays `(height, width, channels)` or `(batch,
            height, width, channels)`, uint8 or in [0, 1], or tensors `(channels, height, width)` or `(batch, channels, height,
            width)` in [0, 1].
        channels: Number of channels of the UNet's images.

    Raises:
        ValueError: If an image has a wrong type, range or number of channels, or images differ in size.
    """
    if isinstance(image, (list, tuple)):
        parts = [model_images(one, channels) for one in image]
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(
                "`image` must be one or more images of the same size, but got the sizes"
                f" {[tuple(p.shape[2:]) for p in parts]}."
            )
        return torch.cat(parts)
    if isinstance(image, (str, os.PathLike)):
        image = load_image(os.fspath(image), convert_method=lambda picture: picture)
    if isinstance(image, Image.Image):
        if is_deep(image):
            raise ValueError(
                f"`image` must have 8 bits, but its mode is {image.mode!r}. Pass an array of floats in [0, 1]."
            )
        image = np.asarray(to_mode(image, channels))
        image = image.reshape(*image.shape[:2], channels)
    is_array = isinstance(image, np.ndarray) and image.dtype.kind in "buif"
    if is_array:
        pixels = torch.tensor(image, dtype=torch.float32) / (255 if image.dtype == np.uint8 else 1)
        pixels = pixels.movedim(-1, -3) if pixels.ndim > 2 else pixels
    elif isinstance(image, torch.Tensor) and not (
        image.is_complex() or image.is_meta or image.layout != torch.strided
    ):
        pixels = image.float()
    else:
        raise ValueError(
            "`image` must be a PIL image, a path or URL, or a dense array or tensor of real numbers, but got"
            f" {type(image).__name__} {getattr(image, 'dtype', '')}."
        )
    pixels = pixels[None] if pixels.ndim == 2 and channels == 1 else pixels
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.numel():
        raise ValueError(
            f"`image` must have {channels} channels, in the last dimension of an array or the third from last of a tensor, but"
            f" got the shape {tuple(image.shape)}."
        )
    low, high = pixels.aminmax()
    if not (0 <= low and high <= 1):  # also true for NaN
        raise ValueError(f"`image` must be in [0, 1], but got values from {low:g} to {high:g}.")
    return 2 * pixels - 1
