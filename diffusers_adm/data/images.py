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
from diffusers_adm.options import Check, in_range, option


logger = logging.getLogger(__name__)

CROPS = ("center", "random", "pad")
UNREADABLE = ("stop", "skip")
NO_READABLE_IMAGE = "The dataset has no image that can be read."
MAX_RESOLUTION = 2**13


@dataclass(frozen=True)
class ImageFormat:
    """
    Size and channels to which images are converted. Without `resolution`, images keep their size. Without `in_channels`, the first
    image decides.

    Raises:
        ValueError: If `source_resolution` is not a larger multiple of `resolution`.
    """

    resolution: int | None = option(
        64, help="Height and width of the images, in pixels.", check=in_range(1, MAX_RESOLUTION)
    )
    in_channels: int | None = option(3, choices=(1, 3), help="Number of channels: 1 for grey images, 3 for colour.")
    crop: str = option(
        "center",
        choices=CROPS,
        help="Crop of the images. center: central square, as the paper's UNets were trained. random: random square, as its"
        " classifiers were trained. pad: whole image on a black background, for small images.",
    )
    source_resolution: int | None = option(
        None,
        help="Crop to this multiple of --resolution, in pixels, then shrink by averaging, as for the small images of an"
        " upsampler. Default: none.",
        check=in_range(1, MAX_RESOLUTION),
    )
    image_range: tuple[float, float] | None = option(
        None,
        help="Values of black and white in grey images of more than 8 bits, such as 0,4095 for 12 bits. Integers require it."
        " Default for floats: 0,1.",
        metavar="BLACK,WHITE",
        check=Check("two increasing numbers", lambda ends: len(ends) == 2 and ends[0] < ends[1]),
        resumable=True,
        on_card=True,
    )

    def __post_init__(self):
        source, target = self.source_resolution, self.resolution
        if source is not None and not (target is not None and source > target and source % target == 0):
            raise ValueError(
                f"--source_resolution must be a multiple of --resolution {target} and larger, but got {source}."
            )

    def fit(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        """
        Crops and resizes an image.

        Args:
            image: Image of any size.
            rng: Random numbers of a random crop. `None` means a central crop.

        Raises:
            ValueError: If the image is too large to be padded.
        """
        return fit_image(image, self.resolution, self.crop, rng, self.source_resolution)


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
            image = self.format.fit(image, rng if self.augment else None)
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


def fit_image(
    image: Image.Image, resolution: int, crop: str, rng: random.Random | None, source_resolution: int | None = None
) -> Image.Image:
    """
    Returns a square image of the given resolution.

    Args:
        image: Image of any size.
        resolution: Height and width in pixels.
        crop: One of `CROPS`.
        rng: Random numbers of a random crop. `None` means a central crop.
        source_resolution: Resolution of the crop. It is then reduced to `resolution` by averaging blocks of pixels.

    Raises:
        ValueError: If the image is too large to be padded.
    """
    if source_resolution is not None:
        return fit_image(image, source_resolution, crop, rng).reduce(source_resolution // resolution)
    if crop == "pad":
        if max(image.size) > resolution:
            size = f"{image.width}x{image.height}"
            raise ValueError(
                f"--crop pad requires images of at most {resolution}x{resolution} pixels, but got {size}."
            )
        return TF.center_crop(image, [resolution, resolution])
    if crop == "random" and rng is not None:
        return random_crop(image, resolution, rng)
    return center_crop(image, resolution)


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
