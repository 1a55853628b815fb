"""Decoding, cropping and conversion of single images."""

import logging
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import functional as TF

from diffusers_adm.data.image_modes import to_mode
from diffusers_adm.data.options import ImageFormat


logger = logging.getLogger(__name__)

NO_READABLE_IMAGE = "The dataset has no image that can be read."


@dataclass(frozen=True)
class Columns:
    """
    Columns of a dataset with images and labels.

    Args:
        image: Name of the column of undecoded images.
        label: Name of the column of class numbers, or `None` without labels.
        class_names: Name of each class in the order of the labels, or `None` without labels.
    """

    image: str
    label: str | None = None
    class_names: list[str] | None = None


@dataclass
class ImageReader:
    """
    Converts rows of a dataset to items. An item has an `image`, `(channels, resolution, resolution)`, float32 in [-1, 1]. If there
    are labels, it also has a `label`, an int.

    Args:
        columns: Columns of the dataset.
        format: Size and channels of the items.
        augment: Whether images are augmented by random crops and flips.
        random_flip: Whether augmentation mirrors each image with probability 0.5.
        on_unreadable: Response to an unreadable image: `"stop"` raises an error, `"skip"` leaves the image out.
    """

    columns: Columns
    format: ImageFormat
    augment: bool = True
    random_flip: bool = True
    on_unreadable: str = "stop"
    reported: set[str] = field(default_factory=set, init=False)

    def read(self, row: dict, number: int, key: str) -> dict | None:
        """
        Returns the item of a row, or `None` if the image is unreadable and `on_unreadable` is `"skip"`.

        Args:
            row: Row of the dataset.
            number: Position of the row.
            key: Seed of the random crop and flip.

        Raises:
            ValueError: If the image is unreadable or does not fit the crop, or the label is unknown.
        """
        name = file_name(row[self.columns.image], number)
        try:
            image = decode(row[self.columns.image])
        except UnreadableImage as error:
            self._report(name, error)
            return None
        rng = random.Random(key)
        try:
            image = to_mode(image, self.format.in_channels, self.format.image_range)
            image = fit_image(image, self.format, rng if self.augment else None)
        except ValueError as error:
            raise ValueError(f"Image {name}: {error}") from error
        if self.augment and self.random_flip and rng.random() < 0.5:
            image = TF.hflip(image)
        item = {"image": to_tensor(image)}
        if self.columns.label is not None:
            item["label"] = row[self.columns.label]
            known = range(len(self.columns.class_names))
            if item["label"] not in known:
                raise ValueError(
                    f"Labels must be in [0, {known[-1]}], but image {name} has the label {item['label']}."
                )
        return item

    def _report(self, name: str, error: Exception) -> None:
        if self.on_unreadable == "stop":
            raise ValueError(
                f"Image {name} cannot be read ({error}). Remove it, or pass --on_unreadable skip."
            ) from error
        if name not in self.reported:
            logger.warning("Image %s cannot be read and is skipped: %s", name, error)
            self.reported.add(name)


class UnreadableImage(Exception):
    """Image that cannot be decoded."""


def file_name(value: dict | None, index: int) -> str:
    """Returns the name of an image for messages: its file name, or its position in the dataset."""
    return (value or {}).get("path") or f"number {index}"


def decode(value: dict | None) -> Image.Image:
    """
    Decodes an image of an undecoded column, and rotates it as its EXIF data says.

    Raises:
        UnreadableImage: If the image is missing, damaged, or larger than the limit of Pillow.
    """
    if value is None:
        raise UnreadableImage("it is missing")
    try:
        path, content = value["path"], value["bytes"]
        if content is None and path is not None and Path(path).is_file():
            content = Path(path).read_bytes()  # because `datasets` does not close a file that it cannot decode
        return ImageFeature().decode_example({"path": path, "bytes": content})
    except UnidentifiedImageError as error:
        raise UnreadableImage("it is damaged, or of a format that Pillow does not support") from error
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise UnreadableImage(str(error)) from error


def fit_image(image: Image.Image, format: ImageFormat, rng: random.Random | None = None) -> Image.Image:
    """
    Crops and resizes an image to the resolution of a format.

    Args:
        image: Image of any size.
        format: Format with a resolution.
        rng: Random numbers of a random crop. `None` means a central crop.

    Raises:
        ValueError: If the image is too large to be padded.
    """
    resolution = format.source_resolution or format.resolution
    if format.crop == "pad":
        if max(image.size) > resolution:
            size = f"{image.width}x{image.height}"
            raise ValueError(
                f"--crop pad requires images of at most {resolution}x{resolution} pixels, but got {size}."
            )
        image = TF.center_crop(image, [resolution, resolution])
    elif format.crop == "random" and rng is not None:
        image = random_crop(image, resolution, rng)
    else:
        image = center_crop(image, resolution)
    # With a source resolution, each pixel is the mean of a block of pixels.
    return image if format.source_resolution is None else image.reduce(resolution // format.resolution)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the shorter side to `resolution`, then cuts out the central square, as the original code does."""
    image = _shrink(image, resolution)
    left, top = (
        (image.width - resolution) // 2,
        (image.height - resolution) // 2,
    )  # rounded down, as in the original code
    return TF.crop(image, top, left, resolution, resolution)


def random_crop(
    image: Image.Image,
    resolution: int,
    rng: random.Random,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> Image.Image:
    """
    Resizes the image, then cuts out a square of side `resolution` at a random place, as the original code does for classifiers. The
    side is a random fraction of the shorter side of the resized image, from `min_fraction` to `max_fraction`.
    """
    shorter = rng.randrange(math.ceil(resolution / max_fraction), math.ceil(resolution / min_fraction) + 1)
    image = _shrink(image, shorter)
    left = rng.randrange(image.width - resolution + 1)
    top = rng.randrange(image.height - resolution + 1)
    return TF.crop(image, top, left, resolution, resolution)


def _shrink(image: Image.Image, shorter: int) -> Image.Image:
    # Images are halved by averaging first, because the bicubic filter sees few pixels and would alias.
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, resample=Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts an 8-bit image to `(channels, height, width)` in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
