"""Options of image data: place, format and selection of images."""

from dataclasses import dataclass

from diffusers_adm.data.images import UNREADABLE
from diffusers_adm.options import at_least, in_range, option


LABEL_SOURCES = ("column", "filename_prefix")


def workers_read_the_same_images(values: dict) -> bool:
    """Returns whether any number of a loader's workers gives the same images. Workers of a stream read files of their own."""
    return not values["streaming"]


@dataclass(frozen=True)
class ImageSource:
    """Place of a dataset's images and labels."""

    dataset_name: str | None = option(
        None,
        help="Hub id, local folder, or format (parquet, webdataset; with --data_files) of a dataset. Default: none.",
        resumable=True,
    )
    train_data_dir: str | None = option(
        None,
        help="Folder of images in one subfolder per class, instead of --dataset_name. Default: none.",
        resumable=True,
    )
    dataset_config_name: str | None = option(
        None, help="Name of the configuration of the dataset. Default: the only one."
    )
    dataset_revision: str | None = option(None, help="Branch, tag or commit of the dataset on the Hub. Default: main.")
    data_files: list[str] | dict[str, str] | None = option(
        None, help="Files of the dataset, or patterns of them. Default: all files.", resumable=True
    )
    cache_dir: str | None = option(
        None, help="Folder of downloads and prepared data. Default: the cache of datasets.", resumable=True
    )
    image_column: str | None = option(None, help="Name of the image column. Default: the only one.")
    label_column: str | None = option(None, help="Name of the label column. Default: the only one of type ClassLabel.")
    label_from: str = option(
        "column",
        choices=LABEL_SOURCES,
        help="Place of the labels. filename_prefix: the part of each image's file name before the first _.",
    )


@dataclass(frozen=True)
class ImageSelection:
    """Splits of a dataset to train and to validate on, and the order and state of their images."""

    train_split: str = option("train", help="Split to train on, such as train or train[:90%].")
    validation_split: str | None = option(None, help="Split of held-out images, to validate on. Default: none.")
    validation_fraction: float | None = option(
        None, help="Share of each class that is held out, in (0, 1), instead of --validation_split. Default: none."
    )
    max_train_samples: int | None = option(None, help="Number of images to train on, chosen by --seed. Default: all.")
    streaming: bool = option(
        False, help="Fetch images during training, instead of all before. For datasets of many files."
    )
    shuffle_buffer: int = option(
        10_000, help="Number of images of a stream that the next one is drawn from.", check=at_least(1)
    )
    num_classes: int | None = option(
        None,
        help="Number of classes of a stream whose labels are numbers without names. Default: the classes that the dataset names.",
    )
    on_unreadable: str = option("stop", choices=UNREADABLE, help="Response to an unreadable image.", resumable=True)
    random_flip: bool = option(True, help="Mirror every second image, at random.")
    dataloader_num_workers: int = option(
        0,
        help="Number of processes that load images.",
        check=in_range(0, 1024),
        resumable=workers_read_the_same_images,
    )
