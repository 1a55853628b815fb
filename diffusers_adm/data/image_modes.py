"""Conversion of images of any mode to 8-bit grey or colour."""

import numpy as np
from PIL import Image, ImageOps


MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, channels: int, value_range: tuple[float, float] | None = None) -> Image.Image:
    """
    Converts an image to 8-bit grey or colour, and rotates it as its EXIF data says. Transparent pixels become white.

    Args:
        image: Image of any mode.
        channels: Number of channels: 1 for grey, 3 for colour.
        value_range: Values of black and white in images of more than 8 bits. `None` means [0, 1] for floats. Integers require a
            range, because images of 10, 12 or 14 bits are also stored in 16 bits.

    Raises:
        ValueError: If `channels` is neither 1 nor 3, or the range of an image of more than 8 bits is unknown or does not
            contain its values.
    """
    if channels not in MODES:
        raise ValueError(
            f"Images must have 1 or 3 channels, but {channels} are required. Pass tensors instead of images."
        )
    image = ImageOps.exif_transpose(image)
    if is_deep(image):
        image = Image.fromarray(_to_8_bits(np.asarray(image), value_range))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def is_deep(image: Image.Image) -> bool:
    """Returns whether an image is grey and has more than 8 bits, as integers or floats."""
    return image.mode.startswith(("I", "F"))


def _to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    if value_range is None and values.dtype.kind == "f":
        value_range = (0.0, 1.0)
    lowest, highest = values.min(), values.max()
    if value_range is None or not value_range[0] <= lowest <= highest <= value_range[1]:  # false for NaN
        problem = "unknown" if value_range is None else f"[{value_range[0]:g}, {value_range[1]:g}]"
        raise ValueError(
            f"The range of an image of more than 8 bits is {problem}, but its values are in [{lowest:.8g}, {highest:.8g}]. Pass the"
            " values of black and white, such as --image_range=0,65535 for 16 bits, or scale the images to 8 bits."
        )
    black, white = value_range
    if values.dtype.kind == "u" and values.dtype.itemsize == 2 and white > 65535:
        raise ValueError(f"White in --image_range must be at most 65535 for images of 16 bits, but got {white:g}.")
    return ((values.astype(np.float64) - black) * (255 / (white - black))).round().astype(np.uint8)
