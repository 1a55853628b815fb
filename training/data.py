"""Labelled images for training: whatever `datasets.load_dataset` reads, cropped as the paper crops."""

import argparse
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms import functional as TF


CROPS = ("center", "random", "pad")


@dataclass
class LabelledImages:
    """
    A split of a dataset, ready for a `DataLoader`.

    Args:
        dataset: Items have `image`, `(channels, resolution, resolution)` float32 in [-1, 1], and, if there are labels,
            `label`, an int.
        class_names: Name of each class, in the order of the labels; `None` without labels.
    """

    dataset: Dataset
    class_names: list[str] | None


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `load_images`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, or a local folder that load_dataset reads (parquet, images).")
    group.add_argument("--dataset_config_name", default=None)
    group.add_argument(
        "--train_data_dir", help="Folder of images in one subfolder a class, instead of a dataset name."
    )
    group.add_argument("--cache_dir", default=None)
    group.add_argument("--train_split", default="train")
    group.add_argument("--image_column", default=None, help="Found by itself if there is one.")
    group.add_argument("--label_column", default=None, help="Found by itself if there is one of type ClassLabel.")
    group.add_argument("--resolution", type=int, default=64)
    group.add_argument("--in_channels", type=int, choices=(1, 3), default=3, help="1 for grey images, 3 for colour.")
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="center: the paper's for UNets; random: for classifiers; pad: small images on black.",
    )
    group.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--dataloader_num_workers", type=int, default=0)


def load_images(args: argparse.Namespace, split: str, augment: bool) -> LabelledImages:
    """
    Loads one split.

    Args:
        args: Parsed `add_data_arguments`.
        split: Name of the split.
        augment: Whether to crop and flip at random, where `args` asks for it.

    Raises:
        ValueError: If there is no such split or column, or the labels are not class numbers.
        DatasetNotFoundError: If there is no such dataset.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Give either --dataset_name or --train_data_dir.")
    if args.dataset_name is not None:
        dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    else:
        dataset = load_dataset("imagefolder", data_dir=args.train_data_dir, split=split, cache_dir=args.cache_dir)

    image_column = args.image_column or _only_column(dataset, ImageFeature)
    if image_column not in dataset.column_names:
        raise ValueError(f"No image column {image_column!r} among {dataset.column_names}: name it by --image_column.")
    label_column = args.label_column or _only_column(dataset, ClassLabel)
    if label_column is not None and label_column not in dataset.column_names:
        raise ValueError(f"No label column {label_column!r} among {dataset.column_names}.")

    class_names = None
    if label_column is not None:
        feature = dataset.features[label_column]
        if isinstance(feature, ClassLabel):
            class_names = feature.names
        else:
            labels = dataset.unique(label_column)
            if not all(isinstance(label, int) and label >= 0 for label in labels):
                raise ValueError(f"Column {label_column!r} holds {labels[:5]}..., not class numbers from 0.")
            class_names = [str(label) for label in range(max(labels) + 1)]

    mode = {1: "L", 3: "RGB"}[args.in_channels]

    def transform(rows: dict) -> dict:
        images = [fit_image(image.convert(mode), args.resolution, args.crop, augment) for image in rows[image_column]]
        if augment and args.random_flip:
            images = [TF.hflip(image) if random.random() < 0.5 else image for image in images]
        items = {"image": [to_tensor(image) for image in images]}
        if label_column is not None:
            items["label"] = rows[label_column]
        return items

    return LabelledImages(dataset.with_transform(transform), class_names)


def _only_column(dataset: Dataset, feature_type: type) -> str | None:
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, feature_type)]
    if len(columns) > 1:
        raise ValueError(f"Columns {columns} are all of type {feature_type.__name__}: name the one to use.")
    return columns[0] if columns else None


def fit_image(image: Image.Image, resolution: int, crop: str, augment: bool) -> Image.Image:
    """A square image of the given resolution; `augment=False` makes of a random crop the central one."""
    if crop == "pad":
        if max(image.size) > resolution:
            raise ValueError(f"--crop pad: an image of {image.size} does not fit into {resolution}x{resolution}.")
        return TF.center_crop(image, [resolution, resolution])
    if crop == "random" and augment:
        return random_crop(image, resolution)
    return center_crop(image, resolution)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Shorter side to `resolution`, then the central square: the crop of the published training and statistics."""
    image = _shrink(image, resolution)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2  # rounded down, as published
    return TF.crop(image, top, left, resolution, resolution)


def random_crop(image: Image.Image, resolution: int, min_fraction: float = 0.8, max_fraction: float = 1.0):
    """A square at a random place whose side is a random fraction of the shorter side: classifiers train on these."""
    shorter = random.randrange(math.ceil(resolution / max_fraction), math.ceil(resolution / min_fraction) + 1)
    image = _shrink(image, shorter)
    left = random.randrange(image.width - resolution + 1)
    top = random.randrange(image.height - resolution + 1)
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
