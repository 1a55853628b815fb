"""Conversion of pictures of all modes to 8-bit grey or colour."""

import numpy as np
from PIL import Image, ImageOps


MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, channels: int, value_range: tuple[float, float] | None = None) -> Image.Image:
    """
    Converts a picture to 8-bit grey or colour, and turns it as its EXIF data says. Transparent pixels become white.

    Args:
        image: Picture of any mode.
        channels: 1 for grey, 3 for colour.
        value_range: Values of black and white in pictures of more than 8 bits. `None` means [0, 1] for floats. That of
            integers is unknown then, because 16 bits hold 10, 12 or 14 as well.

    Raises:
        ValueError: If `channels` is neither 1 nor 3, or the range of a picture of more than 8 bits is unknown or does not
            contain its values.
    """
    if channels not in MODES:
        raise ValueError(f"A picture has 1 channel or 3, and {channels} are needed: give tensors.")
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        image = Image.fromarray(_to_8_bits(np.asarray(image), value_range))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def is_deep(image: Image.Image) -> bool:
    """Returns whether a picture is grey of more than 8 bits: integers or floats."""
    return image.mode.startswith(("I", "F"))


def _to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    if value_range is None and values.dtype.kind == "f":
        value_range = (0.0, 1.0)
    lowest, highest = values.min(), values.max()
    if value_range is None or not value_range[0] <= lowest <= highest <= value_range[1]:  # false for NaN
        known = "an unknown range" if value_range is None else f"the range [{value_range[0]:g}, {value_range[1]:g}]"
        raise ValueError(
            f"A picture of more than 8 bits has {known}, and values in [{lowest:g}, {highest:g}]: pass the values of black"
            " and white of all pictures, such as --image_range=0,65535 for 16 bits, or scale it to 8 bits."
        )
    black, white = value_range
    if values.dtype == np.uint16 and white > 65535:
        raise ValueError(f"A picture of 16 bits holds values up to 65535, but --image_range gives white as {white:g}.")
    return ((values.astype(np.float64) - black) * (255 / (white - black))).round().astype(np.uint8)
