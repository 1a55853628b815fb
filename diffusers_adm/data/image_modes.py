"""Pictures of all kinds as 8-bit grey or colour."""

import numpy as np
from PIL import Image, ImageOps


MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """
    8-bit grey or colour, turned as its EXIF data says; 16 bits are scaled to 8, and what is transparent shows white.

    Args:
        image: Of any mode.
        channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: If no picture has so many channels.
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
