"""Conversion of pictures of all modes to 8-bit grey or colour."""

import numpy as np
from PIL import Image, ImageOps


MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """
    Converts a picture to 8-bit grey or colour, and turns it as its EXIF data says. 16 bits are scaled to 8, and transparent
    pixels become white.

    Args:
        image: Picture of any mode.
        channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: If `channels` is neither 1 nor 3.
    """
    if channels not in MODES:
        raise ValueError(f"A picture has 1 channel or 3, and {channels} are needed: give tensors.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])
