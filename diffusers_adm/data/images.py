"""One training image: decoded, cropped as the paper crops, and made a tensor."""

import argparse
import logging
import math
import random

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms import functional as TF

from diffusers_adm.data.image_modes import to_mode


logger = logging.getLogger(__name__)

CROPS = ("center", "random", "pad")
UNREADABLE = ("stop", "skip")


class ImageReader:
    """
    Makes items of rows: `image`, `(channels, resolution, resolution)` float32 in [-1, 1], and, if there are labels, `label`,
    an int.

    Args:
        args: Parsed `add_data_arguments`.
        image_column: Name of the column of undecoded images.
        label_column: Name of the column of class numbers, or `None`.
        class_names: Of each class, in the order of the labels, or `None`.
        augment: Whether to crop and flip at random, where `args` asks for it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        image_column: str,
        label_column: str | None,
        class_names: list[str] | None,
        augment: bool,
    ):
        self.args = args
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = class_names
        self.augment = augment
        self.reported: set[str] = set()

    def read(self, row: dict, number: int, key: str) -> dict | None:
        """
        The item of a row; `None` where it is unreadable and `on_unreadable` is "skip".

        Args:
            row: Of the dataset.
            number: Where it stands there.
            key: Decides what is drawn at random for it.

        Raises:
            ValueError: If it is unreadable, or does not fit the crop.
        """
        name = file_name(row[self.image_column], number)
        try:
            image = decode(row[self.image_column])
        except UnreadableImage as error:
            self._report(name, error)
            return None
        rng = random.Random(key)
        try:
            image = to_mode(image, self.args.in_channels)
            args = self.args
            image = fit_image(image, args.resolution, args.crop, rng if self.augment else None, args.source_resolution)
        except ValueError as error:
            raise ValueError(f"Image {name}: {error}") from error
        if self.augment and self.args.random_flip and rng.random() < 0.5:
            image = TF.hflip(image)
        item = {"image": to_tensor(image)}
        if self.label_column is not None:
            item["label"] = row[self.label_column]
            known = range(len(self.class_names))
            if item["label"] not in known:
                raise ValueError(f"Image {name} has label {item['label']}, which is not in 0 ... {known[-1]}.")
        return item

    def _report(self, name: str, error: Exception) -> None:
        if self.args.on_unreadable == "stop":
            raise ValueError(
                f"Image {name} cannot be read ({error}): remove it, or pass --on_unreadable skip."
            ) from error
        if name not in self.reported:
            logger.warning("Skipping image %s, which cannot be read: %s", name, error)
            self.reported.add(name)


class UnreadableImage(Exception):
    """An image that cannot be decoded."""


def file_name(value: dict | None, index: int) -> str:
    """What an image is called in messages: its file, or where it stands in the dataset."""
    return (value or {}).get("path") or f"number {index}"


def decode(value: dict | None) -> Image.Image:
    """
    An image of an undecoded column, turned as its EXIF data says.

    Raises:
        UnreadableImage: If it is missing, damaged, or larger than PIL trusts.
    """
    if value is None:
        raise UnreadableImage("there is none")
    try:
        return ImageFeature().decode_example(value)
    except Exception as error:  # PIL's decoders raise all sorts
        raise UnreadableImage(str(error)) from error


def fit_image(
    image: Image.Image, resolution: int, crop: str, rng: random.Random | None, source_resolution: int | None = None
) -> Image.Image:
    """
    A square image of the given resolution.

    Args:
        image: Of any size.
        resolution: In pixels.
        crop: One of `CROPS`.
        rng: Of the place of a random crop; without it, that becomes the central one.
        source_resolution: With it, the image is made of this resolution first; each pixel is the mean of those it covers.

    Raises:
        ValueError: If the image is larger than it is to be padded to.
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
    """Shorter side to `resolution`, then the central square: the crop of the published training and statistics."""
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
    """A square at a random place whose side is a random fraction of the shorter side: classifiers train on these."""
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
    """8-bit image to `(channels, height, width)` in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
