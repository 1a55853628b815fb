"""Pictures that users upload, and pictures that the page shows."""

import uuid
from io import BytesIO

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import to_tensor

from diffusers_adm.data.image_modes import to_mode
from diffusers_adm.page.model import PageModel


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**24
SHOWN_SIDE = 256  # smaller pictures are enlarged to at least this many pixels


def decode_upload(file: str | BytesIO) -> Image.Image:
    """
    Decodes an uploaded picture, as RGBA. Its size is checked before any pixel is decoded.

    Args:
        file: Path of the file, or its content.

    Raises:
        ValueError: If the format is not in `FORMATS`, the file is damaged, or the picture has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(picture).convert("RGBA")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"The picture is too large: at most {MAX_PIXELS // 10**6} million pixels are allowed."
        ) from None
    except Exception:  # decoders raise errors of many types
        raise ValueError(f"The upload must be a picture that can be read ({', '.join(FORMATS)}).") from None


def model_picture(picture: Image.Image, model: PageModel) -> Image.Image:
    """Returns the central square of a picture in the size and mode of a model's images. Pixels are averaged."""
    picture = to_mode(picture, model.channels)
    return ImageOps.fit(picture, (model.size, model.size), Image.Resampling.BOX)


def model_input(picture: Image.Image, model: PageModel) -> torch.Tensor:
    """Returns a picture as a batch of one image of a model, in [-1, 1], `(1, channels, height, width)`."""
    return 2 * to_tensor(model_picture(picture, model))[None].to(model.device) - 1


def enlarged(picture: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """
    Returns a picture for the page, enlarged by an integer factor, so that every pixel of the model can be seen.

    Args:
        picture: Picture of the model's pixels.
        side: Smallest length of the longer side in pixels.
    """
    factor = max(1, -(-side // max(picture.size)))
    return distinct(picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST))


def distinct(picture: Image.Image) -> Image.Image:
    """Makes the file of a picture unique, because gradio writes equal files again, even while they are read. Returns the picture."""
    picture.info["Title"] = uuid.uuid4().hex
    return picture
