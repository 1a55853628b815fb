"""Labelled images for training: whatever `datasets.load_dataset` reads, cropped as the paper crops."""

import argparse
import logging
import math
import random
from pathlib import PurePath

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets.features import Value
from PIL import Image
from torchvision.transforms import functional as TF


logger = logging.getLogger(__name__)

CROPS = ("center", "random", "pad")
UNREADABLE = ("stop", "skip")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `load_images`."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name", help="Hub id, local folder, or format (parquet, webdataset; with --data_files)."
    )
    group.add_argument("--dataset_config_name", default=None)
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of the dataset on the Hub.")
    group.add_argument("--data_files", nargs="+", default=None, help="Files of the dataset, or patterns of them.")
    group.add_argument(
        "--train_data_dir", help="Folder of images in one subfolder a class, instead of a dataset name."
    )
    group.add_argument("--cache_dir", default=None)
    group.add_argument("--train_split", default="train", help="For example train, or train[:90%%].")
    group.add_argument("--validation_split", default=None, help="Split that is held out, to measure on.")
    group.add_argument(
        "--validation_fraction", type=float, default=None, help="Share of each class to hold out, instead of a split."
    )
    group.add_argument(
        "--max_train_samples", type=int, default=None, help="Train on so many images, chosen by --seed."
    )
    group.add_argument("--image_column", default=None, help="Found by itself if there is one.")
    group.add_argument("--label_column", default=None, help="Found by itself if there is one of type ClassLabel.")
    group.add_argument(
        "--label_from",
        choices=("column", "filename_prefix"),
        default="column",
        help="filename_prefix: what stands before the first _ in the name of an image's file.",
    )
    group.add_argument("--on_unreadable", choices=UNREADABLE, default="stop", help="What an unreadable image does.")
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


class LabelledImages(torch.utils.data.Dataset):
    """
    Images of one split. Items have `image`, `(channels, resolution, resolution)` float32 in [-1, 1], and, if there are
    labels, `label`, an int.

    What is drawn at random for an image depends on the seed, the epoch and the image's index alone: neither the number of
    workers nor an interruption changes it.

    Args:
        rows: Of the dataset, with an undecoded image column.
        image_column: Its name.
        label_column: Name of a column of type `ClassLabel`, or `None`.
        args: Parsed `add_data_arguments`, and `seed`.
        augment: Whether to crop and flip at random, where `args` asks for it.
    """

    def __init__(
        self, rows: Dataset, image_column: str, label_column: str | None, args: argparse.Namespace, augment: bool
    ):
        self.rows = rows
        self.image_column = image_column
        self.label_column = label_column
        self.args = args
        self.augment = augment
        self.epoch = 0
        self.reported: set[str] = set()

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class, in the order of the labels; `None` without labels."""
        return None if self.label_column is None else self.rows.features[self.label_column].names

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Draws anew what is random about the images."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        """
        The image at an index; where it is unreadable and `on_unreadable` is "skip", the next that is not.

        Raises:
            ValueError: If it is unreadable, or does not fit the crop.
        """
        for candidate in (*range(index, len(self)), *range(index)):
            row = self.rows[candidate]
            try:
                image = decode(row[self.image_column])
            except UnreadableImage as error:
                self._report(file_name(row[self.image_column], candidate), error)
                continue
            try:
                return self._prepare(image, row, candidate)
            except ValueError as error:
                raise ValueError(f"Image {file_name(row[self.image_column], candidate)}: {error}") from error
        raise ValueError("Not one image of the dataset can be read.")

    def _prepare(self, image: Image.Image, row: dict, index: int) -> dict:
        rng = random.Random(f"{self.args.seed}-{self.epoch}-{index}")
        image = to_mode(image, self.args.in_channels)
        image = fit_image(image, self.args.resolution, self.args.crop, rng if self.augment else None)
        if self.augment and self.args.random_flip and rng.random() < 0.5:
            image = TF.hflip(image)
        item = {"image": to_tensor(image)}
        if self.label_column is not None:
            item["label"] = row[self.label_column]
        return item

    def _report(self, name: str, error: Exception) -> None:
        if self.args.on_unreadable == "stop":
            raise ValueError(
                f"Image {name} cannot be read ({error}): remove it, or pass --on_unreadable skip."
            ) from error
        if name not in self.reported:
            logger.warning("Skipping image %s, which cannot be read: %s", name, error)
            self.reported.add(name)


def required_class_names(images: LabelledImages) -> list[str]:
    """
    The names of the classes.

    Raises:
        ValueError: If there are no labels, or there is a single class.
    """
    if images.class_names is None:
        raise ValueError(
            "The dataset has no labels: name them by --label_column or --label_from, or train a UNet with"
            " --no-class_conditional."
        )
    if len(images.class_names) < 2:
        raise ValueError(f"The dataset has a single class, {images.class_names[0]!r}: there is nothing to tell apart.")
    return images.class_names


def load_images(args: argparse.Namespace, labelled: bool = True) -> tuple[LabelledImages, LabelledImages | None]:
    """
    Loads the images to train on, and those that are held out.

    Args:
        args: Parsed `add_data_arguments`, and `seed`.
        labelled: Whether to look for labels.

    Returns:
        Both; the second is `None` where nothing is held out.

    Raises:
        ValueError: If there is no such split or column, some labels are missing, or a held-out split has other classes.
        DatasetNotFoundError: If there is no such dataset.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Give either --dataset_name or --train_data_dir.")
    if args.validation_split is not None and args.validation_fraction is not None:
        raise ValueError("Give either --validation_split or --validation_fraction.")
    train, image_column, label_column = _load_rows(args, args.train_split, labelled)
    held_out = None
    if args.validation_split is not None:
        classes = None if label_column is None else train.features[label_column]
        held_out, *_ = _load_rows(args, args.validation_split, labelled, classes)
    elif args.validation_fraction is not None:
        if not 0 < args.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {args.validation_fraction} is not between 0 and 1.")
        split = train.train_test_split(args.validation_fraction, seed=args.seed, stratify_by_column=label_column)
        train, held_out = split["train"], split["test"]
    if args.max_train_samples is not None:
        if not 1 <= args.max_train_samples <= len(train):
            raise ValueError(f"--max_train_samples {args.max_train_samples} is not in 1 ... {len(train)}.")
        train = train.shuffle(seed=args.seed).select(range(args.max_train_samples))
    images = LabelledImages(train, image_column, label_column, args, augment=True)
    if held_out is not None:
        held_out = LabelledImages(held_out, image_column, label_column, args, augment=False)
    return images, held_out


def _load_rows(
    args: argparse.Namespace, split: str, labelled: bool, classes: ClassLabel | None = None
) -> tuple[Dataset, str, str | None]:
    """A split's rows, images undecoded and labels of the given classes or its own, and the names of the two columns."""
    source = (
        {"path": "imagefolder", "data_dir": args.train_data_dir}
        if args.dataset_name is None
        else {"path": args.dataset_name, "name": args.dataset_config_name, "revision": args.dataset_revision}
    )
    rows = load_dataset(**source, data_files=args.data_files, split=split, cache_dir=args.cache_dir)

    image_column = args.image_column or _only_column(rows, ImageFeature)
    if image_column not in rows.column_names:
        raise ValueError(f"No image column {image_column!r} among {rows.column_names}: name it by --image_column.")
    rows = rows.cast_column(image_column, ImageFeature(decode=False))
    if not labelled:
        return rows, image_column, None
    if args.label_from == "filename_prefix":
        return _as_class_label(_label_by_file_name(rows, image_column), "label", classes), image_column, "label"

    label_column = args.label_column or _only_column(rows, ClassLabel)
    if label_column is None and classes is None:
        return rows, image_column, None
    if label_column not in rows.column_names:
        raise ValueError(f"No label column {label_column!r} among {rows.column_names} of split {split!r}.")
    return _as_class_label(rows, label_column, classes), image_column, label_column


def _as_class_label(rows: Dataset, column: str, classes: ClassLabel | None) -> Dataset:
    """Class numbers and class names alike become a ClassLabel; an image without a label is an error."""
    labels, feature = rows.unique(column), rows.features[column]
    if None in labels or (isinstance(feature, ClassLabel) and -1 in labels):
        raise ValueError(f"Some images have no label in column {column!r}.")
    if isinstance(feature, Value) and feature.dtype == "string":
        names = sorted(labels)
    elif isinstance(feature, ClassLabel):
        names = feature.names
    elif all(isinstance(label, int) and label >= 0 for label in labels):
        names = [str(label) for label in range(max(labels) + 1)]
    else:
        raise ValueError(f"Column {column!r} holds {labels[:5]}..., neither names nor class numbers from 0.")
    classes = classes or ClassLabel(names=names)
    unknown = sorted(set(names) - set(classes.names))
    if unknown or (isinstance(feature, ClassLabel) and feature.names != classes.names):
        raise ValueError(
            f"Classes {(unknown or names)[:5]} of the held-out split are not those of the training split."
        )
    return rows if feature == classes else rows.cast_column(column, classes)


def _label_by_file_name(rows: Dataset, image_column: str) -> Dataset:
    names = [file_name(value, index) for index, value in enumerate(rows[image_column])]
    without = [name for name in names if "_" not in PurePath(name).name]
    if without:
        raise ValueError(
            f"--label_from filename_prefix: no _ in {without[0]!r} and {len(without) - 1} other names of files."
        )
    prefixes = [PurePath(name).name.split("_")[0] for name in names]
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    return rows.add_column("label", prefixes)


def _only_column(rows: Dataset, feature_type: type) -> str | None:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, feature_type)]
    if len(columns) > 1:
        raise ValueError(f"Columns {columns} are all of type {feature_type.__name__}: name the one to use.")
    return columns[0] if columns else None


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


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey or colour; 16 bits are scaled to 8, and what is transparent shows white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB"}[channels])


def fit_image(image: Image.Image, resolution: int, crop: str, rng: random.Random | None) -> Image.Image:
    """A square image of the given resolution; without a source of randomness a random crop becomes the central one."""
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
