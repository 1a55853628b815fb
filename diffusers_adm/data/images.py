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
MAX_RESOLUTION = 2**13


@dataclass(frozen=True)
class ImageFormat:
    """
    Size and channels that images are brought to. Without a resolution they keep their size, and without channels those of
    the first image.

    Raises:
        ValueError: If `source_resolution` is not a larger multiple of `resolution`.
    """

    resolution: int | None = option(
        64, help="Height and width of the images, in pixels.", check=in_range(1, MAX_RESOLUTION)
    )
    in_channels: int | None = option(3, choices=(1, 3), help="1 for grey images, 3 for colour.")
    crop: str = option(
        "center",
        choices=CROPS,
        help="center: the paper's for UNets; random: for classifiers; pad: small images on black.",
    )
    source_resolution: int | None = option(
        None,
        help="Crop to this multiple of --resolution, in pixels, and shrink by averages, as the small images of an upsampler"
        " are made. Default: none.",
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
            raise ValueError(f"--source_resolution {source} is not a multiple of --resolution {target}, and larger.")

    def fit(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        """
        Crops and resizes an image.

        Args:
            image: Image of any size.
            rng: Random numbers of a random crop. Without them, it is the central one.

        Raises:
            ValueError: If the image is too large to be padded.
        """
        return fit_image(image, self.resolution, self.crop, rng, self.source_resolution)


@dataclass(frozen=True)
class Columns:
    """
    Columns of a dataset that hold images and labels.

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
    Converts rows of a dataset to items: `image`, `(channels, resolution, resolution)` float32 in [-1, 1], and, if there are
    labels, `label`, an int.

    Args:
        columns: Columns of the dataset.
        format: Size and channels of the items.
        augment: Whether random crops and flips are random.
        random_flip: Whether augmentation mirrors every second image.
        on_unreadable: `"stop"` or `"skip"`.
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
            key: Seed of the row's random crop and flip.

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
                raise ValueError(f"Image {name} has label {item['label']}, which is not in 0 ... {known[-1]}.")
        return item

    def _report(self, name: str, error: Exception) -> None:
        if self.on_unreadable == "stop":
            raise ValueError(
                f"Image {name} cannot be read ({error}): remove it, or pass --on_unreadable skip."
            ) from error
        if name not in self.reported:
            logger.warning("Skipping image %s, which cannot be read: %s", name, error)
            self.reported.add(name)


class UnreadableImage(Exception):
    """Image that cannot be decoded."""


def file_name(value: dict | None, index: int) -> str:
    """Returns the name of an image in messages: its file, or its position in the dataset."""
    return (value or {}).get("path") or f"number {index}"


def decode(value: dict | None) -> Image.Image:
    """
    Decodes an image of an undecoded column, and turns it as its EXIF data says.

    Raises:
        UnreadableImage: If it is missing, damaged, or larger than PIL trusts.
    """
    if value is None:
        raise UnreadableImage("there is none")
    try:
        path, content = value["path"], value["bytes"]
        if content is None and path is not None and Path(path).is_file():
            content = Path(path).read_bytes()  # datasets leaves a file open that cannot be decoded
        return ImageFeature().decode_example({"path": path, "bytes": content})
    except UnidentifiedImageError as error:
        raise UnreadableImage("it is damaged, or no picture that Pillow knows") from error
    except Exception as error:  # PIL's decoders raise all sorts
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
        rng: Random numbers of a random crop. Without them, it is the central one.
        source_resolution: Resolution to crop to. Each pixel of the result is the mean of those that it covers.

    Raises:
        ValueError: If the image is too large to be padded.
    """
    if source_resolution is not None:
        return fit_image(image, source_resolution, crop, rng).reduce(source_resolution // resolution)
    if crop == "pad":
        if max(image.size) > resolution:
            raise ValueError(f"--crop pad: an image of {image.size} does not fit into {resolution}x{resolution}.")
        return TF.center_crop(image, [resolution, resolution])
    if crop == "random" and rng is not None:
        return random_crop(image, resolution, rng)
    return center_crop(image, resolution)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the shorter side to `resolution` and cuts out the central square, as the published training and statistics."""
    image = _shrink(image, resolution)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2  # rounded down, as published
    return TF.crop(image, top, left, resolution, resolution)


def random_crop(
    image: Image.Image,
    resolution: int,
    rng: random.Random,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> Image.Image:
    """Cuts out a square at a random place whose side is a random fraction of the shorter side, as classifiers train on."""
    shorter = rng.randrange(math.ceil(resolution / max_fraction), math.ceil(resolution / min_fraction) + 1)
    image = _shrink(image, shorter)
    left = rng.randrange(image.width - resolution + 1)
    top = rng.randrange(image.height - resolution + 1)
    return TF.crop(image, top, left, resolution, resolution)


def _shrink(image: Image.Image, shorter: int) -> Image.Image:
    # Halving by averages first keeps the bicubic filter, which sees few pixels, from aliasing.
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, resample=Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts an 8-bit image to `(channels, height, width)` in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
