"""Options of image data: place, format and selection of images, and the command-line options of the same names."""

import argparse
from dataclasses import dataclass, fields
from typing import TypeVar

from diffusers_adm.data.images import CROPS, UNREADABLE


LABEL_SOURCES = ("column", "filename_prefix")

Options = TypeVar("Options")


@dataclass(frozen=True)
class ImageSource:
    """
    Place of a dataset's images and labels.

    Args:
        dataset_name: Hub id, local folder, or format (`"parquet"`, `"webdataset"`; with `data_files`).
        train_data_dir: Folder of images in one subfolder per class, instead of a dataset name.
        dataset_config_name: Name of the dataset's configuration.
        dataset_revision: Branch, tag or commit of the dataset on the Hub.
        data_files: Files of the dataset, patterns of them, or either per split.
        cache_dir: Folder of downloads and prepared data.
        image_column: Name of the image column. It is found by its type if there is only one.
        label_column: Name of the label column. It is found by its type if there is only one of type `ClassLabel`.
        label_from: `"column"`, or `"filename_prefix"` for the part of each file name before the first `_`.
    """

    dataset_name: str | None = None
    train_data_dir: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    data_files: list[str] | dict[str, str] | None = None
    cache_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_from: str = "column"


@dataclass(frozen=True)
class ImageSelection:
    """
    Splits of a dataset to train and to validate on, and the order and state of their images.

    Args:
        train_split: For example `"train"` or `"train[:90%]"`.
        validation_split: Split to hold out, or `None`.
        validation_fraction: Share of each class to hold out, instead of a split.
        max_train_samples: Number of images to train on, chosen by the seed. All by default.
        streaming: Whether to fetch images during training, instead of all before.
        shuffle_buffer: Number of images of a stream that the next one is drawn from.
        num_classes: Number of classes of a stream whose labels are numbers without names.
        on_unreadable: `"stop"` or `"skip"`.
        random_flip: Whether to mirror every second image, at random.
        dataloader_num_workers: Number of processes that load images.
    """

    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float | None = None
    max_train_samples: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000
    num_classes: int | None = None
    on_unreadable: str = "stop"
    random_flip: bool = True
    dataloader_num_workers: int = 0


def from_namespace(cls: type[Options], args: argparse.Namespace) -> Options:
    """Returns the dataclass of the parsed options of the same names. Those that the parser lacks keep their defaults."""
    return cls(**{field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)})


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of [`ImageSource`] and [`ImageFormat`], except for those that name the dataset."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset_config_name", default=None, help="Name of the dataset's configuration.")
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of the dataset on the Hub.")
    group.add_argument("--data_files", nargs="+", default=None, help="Files of the dataset, or patterns of them.")
    group.add_argument("--cache_dir", default=None, help="Folder of downloads and prepared data.")
    group.add_argument("--image_column", default=None, help="Name of the image column. Found by its type by default.")
    group.add_argument(
        "--label_column", default=None, help="Name of the label column. Found by its type, ClassLabel, by default."
    )
    group.add_argument(
        "--label_from",
        choices=LABEL_SOURCES,
        default="column",
        help="Place of the labels. filename_prefix: the part of each image's file name before the first _.",
    )
    group.add_argument("--resolution", type=int, default=64, help="Height and width of the images, in pixels.")
    group.add_argument("--in_channels", type=int, choices=(1, 3), default=3, help="1 for grey images, 3 for colour.")
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="center: the paper's crop for UNets; random: for classifiers; pad: small images on black.",
    )
    group.add_argument(
        "--source_resolution",
        type=int,
        default=None,
        help="Crop to this multiple of --resolution and shrink by averages, as an upsampler's small images are made.",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of [`ImageSource`], [`ImageFormat`] and [`ImageSelection`]."""
    add_source_arguments(parser)
    group = parser.add_argument_group("training data")
    group.add_argument(
        "--dataset_name", help="Hub id, local folder, or format (parquet, webdataset; with --data_files)."
    )
    group.add_argument(
        "--train_data_dir", help="Folder of images in one subfolder per class, instead of a dataset name."
    )
    group.add_argument("--train_split", default="train", help="Split to train on, such as train or train[:90%%].")
    group.add_argument("--validation_split", default=None, help="Split that is held out, to validate on.")
    group.add_argument(
        "--validation_fraction", type=float, default=None, help="Share of each class to hold out, instead of a split."
    )
    group.add_argument(
        "--max_train_samples", type=int, default=None, help="Number of images to train on, chosen by --seed."
    )
    group.add_argument(
        "--streaming",
        action="store_true",
        help="Fetch images during training, instead of all before. For datasets of many files.",
    )
    group.add_argument(
        "--shuffle_buffer", type=int, default=10_000, help="Number of images of a stream to draw the next one from."
    )
    group.add_argument(
        "--num_classes",
        type=int,
        default=None,
        help="Number of classes of a stream whose labels are numbers without names.",
    )
    group.add_argument("--on_unreadable", choices=UNREADABLE, default="stop", help="Response to an unreadable image.")
    group.add_argument(
        "--random_flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Mirror every second image, at random.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Number of processes that load images.")
