"""Options of image data: place, format and selection of images."""

from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.options import Check, at_least, in_range, option, option_group


CROPS = ("center", "random", "pad")
UNREADABLE = ("stop", "skip")
MAX_RESOLUTION = 2**13
DEFAULT_SPLIT = "train"
NO_DATASET = ("dataset_name", "train_data_dir")  # options that commands leave out, because a dataset is their argument
LABEL_SOURCES = ("column", "filename_prefix")


def workers_read_the_same_images(values: dict) -> bool:
    """Returns whether any number of a loader's workers gives the same images. Workers of a stream read files of their own."""
    return not values["streaming"]


@dataclass(frozen=True)
class ImageSource:
    """Place of a dataset's images and labels."""

    dataset_name: str | None = option(
        None,
        help="Hub id, local folder, or format (parquet, webdataset; with --data_files) of a dataset.",
        resumable=True,
    )
    train_data_dir: str | None = option(
        None,
        help="Folder of images in one subfolder per class, instead of --dataset_name.",
        resumable=True,
    )
    dataset_config_name: str | None = option(
        None, help="Name of the configuration of the dataset.", unset="the only one"
    )
    dataset_revision: str | None = option(None, help="Branch, tag or commit of the dataset on the Hub.", unset="main")
    data_files: list[str] | dict[str, str] | None = option(
        None, help="Files of the dataset, or patterns of them.", unset="all files", resumable=True
    )
    cache_dir: str | None = option(
        None, help="Folder of downloads and prepared data.", unset="the cache of datasets", resumable=True
    )
    image_column: str | None = option(None, help="Name of the image column.", unset="the only one")
    label_column: str | None = option(None, help="Name of the label column.", unset="the only one of type ClassLabel")
    label_from: str = option(
        "column",
        choices=LABEL_SOURCES,
        help="Place of the labels. filename_prefix: the part of each image's file name before the first _.",
    )


@dataclass(frozen=True)
class ImageFormat:
    """
    Size and channels to which images are converted. Without `resolution`, images keep their size. Without `in_channels`, the first
    image decides.

    Raises:
        ValueError: If `source_resolution` is not a larger multiple of `resolution`.
    """

    resolution: int | None = option(
        64,
        help="Height and width of the images, in pixels.",
        unset="those of each image",
        check=in_range(1, MAX_RESOLUTION),
    )
    in_channels: int | None = option(
        3, choices=(1, 3), help="Number of channels: 1 for grey images, 3 for colour.", unset="that of the first image"
    )
    crop: str = option(
        "center",
        choices=CROPS,
        help="Crop of the images. center: central square, as the paper's UNets were trained. random: random square, as its"
        " classifiers were trained. pad: whole image on a black background, for small images.",
    )
    source_resolution: int | None = option(
        None,
        help="Crop to this multiple of --resolution, in pixels, then shrink by averaging, as for the small images of an"
        " upsampler.",
        check=in_range(1, MAX_RESOLUTION),
    )
    image_range: tuple[float, float] | None = option(
        None,
        help="Values of black and white in grey images of more than 8 bits, such as 0,4095 for 12 bits. Integers require it.",
        unset="0,1 for floats",
        metavar="BLACK,WHITE",
        check=Check("two increasing numbers", lambda ends: len(ends) == 2 and ends[0] < ends[1]),
    )

    def __post_init__(self):
        source, target = self.source_resolution, self.resolution
        if source is not None and not (target is not None and source > target and source % target == 0):
            raise ValueError(
                f"--source_resolution must be a multiple of --resolution {target} and larger, but got {source}."
            )


@dataclass(frozen=True)
class ImageSetOptions:
    """Split, place and format of the images of a dataset. By default, images keep their size and channels."""

    split: str = option(DEFAULT_SPLIT, help="Split of the dataset, such as train or train[:90%].")
    source: ImageSource = option_group(ImageSource, "dataset")
    format: ImageFormat = option_group(ImageFormat, "image format", resolution=None, in_channels=None)

    def check(self, *sources: str | Path) -> None:
        """
        Checks that options which convert images apply to at least one of the sources.

        Raises:
            ValueError: If all sources are `.npz` files, whose images are not converted, or the crop has no effect.
        """
        crop = self.format.crop
        if crop == "random":
            raise ValueError("--crop random is for training. Pass center or pad.")
        if crop == "pad" and self.format.resolution is None:
            raise ValueError("--crop pad requires --resolution, the size that images are padded to.")
        names = ("resolution", "source_resolution", "in_channels", "image_range")
        given = [name for name in names if getattr(self.format, name)]
        if self.split != DEFAULT_SPLIT:
            given.append("split")
        if given and all(Path(source).suffix == ".npz" for source in sources):
            raise ValueError(
                f"{', '.join(f'--{name}' for name in given)} must be left out, because images of .npz files are not converted."
            )


@dataclass(frozen=True)
class ImageSelection:
    """Splits of a dataset to train and to validate on, and the order and state of their images."""

    train_split: str = option("train", help="Split to train on, such as train or train[:90%].")
    validation_split: str | None = option(None, help="Split of held-out images, to validate on.")
    validation_fraction: float | None = option(
        None, help="Share of each class that is held out, in (0, 1), instead of --validation_split."
    )
    max_train_samples: int | None = option(None, help="Number of images to train on, chosen by --seed.", unset="all")
    streaming: bool = option(
        False, help="Fetch images during training, instead of all before. For datasets of many files."
    )
    shuffle_buffer: int = option(
        10_000, help="Number of images of a stream that the next one is drawn from.", check=at_least(1)
    )
    num_classes: int | None = option(
        None,
        help="Number of classes of a stream whose labels are numbers without names.",
        unset="the classes that the dataset names",
    )
    on_unreadable: str = option("stop", choices=UNREADABLE, help="Response to an unreadable image.", resumable=True)
    random_flip: bool = option(True, help="Mirror each image with probability 0.5.")
    dataloader_num_workers: int = option(
        0,
        help="Number of processes that load images.",
        check=in_range(0, 1024),
        resumable=workers_read_the_same_images,
    )
