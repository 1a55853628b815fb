"""Labelled images for training: whatever `datasets.load_dataset` reads, cropped as the paper crops."""

import argparse
import atexit
import copy
import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import PurePath

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from datasets.features import Value
from torch.utils.data import DataLoader, get_worker_info

from diffusers_adm.data.images import CROPS, UNREADABLE, ImageReader, file_name


logger = logging.getLogger(__name__)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where a dataset's images and labels are, and what they are made."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset_config_name", default=None)
    group.add_argument("--dataset_revision", default=None, help="Branch, tag or commit of the dataset on the Hub.")
    group.add_argument("--data_files", nargs="+", default=None, help="Files of the dataset, or patterns of them.")
    group.add_argument("--cache_dir", default=None)
    group.add_argument("--image_column", default=None, help="Found by itself if there is one.")
    group.add_argument("--label_column", default=None, help="Found by itself if there is one of type ClassLabel.")
    group.add_argument(
        "--label_from",
        choices=("column", "filename_prefix"),
        default="column",
        help="filename_prefix: what stands before the first _ in the name of an image's file.",
    )
    group.add_argument("--resolution", type=int, default=64)
    group.add_argument("--in_channels", type=int, choices=(1, 3), default=3, help="1 for grey images, 3 for colour.")
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="center: the paper's for UNets; random: for classifiers; pad: small images on black.",
    )
    group.add_argument(
        "--source_resolution",
        type=int,
        default=None,
        help="Crop to this multiple of --resolution and shrink by averages, as an upsampler's small images are made.",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `load_images`."""
    add_source_arguments(parser)
    group = parser.add_argument_group("training data")
    group.add_argument(
        "--dataset_name", help="Hub id, local folder, or format (parquet, webdataset; with --data_files)."
    )
    group.add_argument(
        "--train_data_dir", help="Folder of images in one subfolder a class, instead of a dataset name."
    )
    group.add_argument("--train_split", default="train", help="For example train, or train[:90%%].")
    group.add_argument("--validation_split", default=None, help="Split that is held out, to measure on.")
    group.add_argument(
        "--validation_fraction", type=float, default=None, help="Share of each class to hold out, instead of a split."
    )
    group.add_argument(
        "--max_train_samples", type=int, default=None, help="Train on so many images, chosen by --seed."
    )
    group.add_argument(
        "--streaming", action="store_true", help="Fetch images while training, instead of all before; of many files."
    )
    group.add_argument("--shuffle_buffer", type=int, default=10_000, help="Images of a stream to draw the next from.")
    group.add_argument(
        "--num_classes", type=int, default=None, help="Of a stream whose labels are numbers without names."
    )
    group.add_argument("--on_unreadable", choices=UNREADABLE, default="stop", help="What an unreadable image does.")
    group.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--dataloader_num_workers", type=int, default=0)


class LabelledImages(torch.utils.data.Dataset):
    """
    Labelled images of one split, as `ImageReader` makes them.

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
        # Of each class, in the order of the labels; `None` without labels.
        self.class_names = None if label_column is None else rows.features[label_column].names
        self.reader = ImageReader(args, image_column, label_column, self.class_names, augment)
        self.epoch = 0

    @property
    def num_images(self) -> int:
        """How many there are."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Draws anew what is random about the images."""
        self.epoch = epoch

    def examples(self, count: int) -> list[dict]:
        """`count` items, or as many as there are, from all over the dataset and always the same; none is augmented."""
        plain = LabelledImages(self.rows, self.image_column, self.label_column, self.args, augment=False)
        count = min(count, len(plain))
        return [plain[i * len(plain) // count] for i in range(count)]

    def __getitem__(self, index: int) -> dict:
        """
        The image at an index; where it is unreadable and `on_unreadable` is "skip", the next that is not.

        Raises:
            ValueError: If it is unreadable, or does not fit the crop.
        """
        if index >= len(self):
            raise IndexError(index)
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            key = f"{self.args.seed}-{self.epoch}-{candidate}"
            item = self.reader.read(self.rows[candidate], candidate, key)
            if item is not None:
                return item
        raise ValueError("Not one image of the dataset can be read.")


class StreamedImages(torch.utils.data.IterableDataset):
    """
    Labelled images of one split, as they come from where they are kept: in an endless stream, each pass in another order.

    With the same seed, files, processes and workers the stream is the same.

    Args:
        rows: Of the dataset, with an undecoded image column, shuffled.
        image_column: Its name.
        label_column: Name of a column of type `ClassLabel`, or `None`.
        args: Parsed `add_data_arguments`, `seed` and `train_batch_size`.

    Raises:
        ValueError: If the files cannot be dealt evenly to the loader's workers.
    """

    num_images = None  # known when the stream ends at the earliest

    def __init__(self, rows: IterableDataset, image_column: str, label_column: str | None, args: argparse.Namespace):
        self.rows = rows
        self.image_column = image_column
        self.label_column = label_column
        self.args = args
        # Of each class, in the order of the labels; `None` without labels.
        self.class_names = None if label_column is None else rows.features[label_column].names
        self.reader = ImageReader(args, image_column, label_column, self.class_names, augment=True)
        state = PartialState()
        self.process = state.process_index
        # Files of its own if they can be dealt evenly; otherwise every n-th image of all files.
        self.share = split_dataset_by_node(rows, rank=state.process_index, world_size=state.num_processes)
        # Where each worker begins: its pass, and how many rows of that are done. A checkpoint keeps them.
        self.positions = [(0, 0)] * max(1, args.dataloader_num_workers)
        check_workers(args, self.share.num_shards)

    def examples(self, count: int) -> list[dict]:
        """
        The first `count` items of the shuffled stream, as many as there are, the same on all processes; none is augmented.

        Raises:
            ValueError: If not one can be read.
        """
        reader = ImageReader(self.args, self.image_column, self.label_column, self.class_names, augment=False)
        items = (reader.read(row, number, "") for number, row in enumerate(copy.deepcopy(self.rows)))
        examples = list(itertools.islice((item for item in items if item is not None), count))
        if not examples:
            raise ValueError("Not one image of the dataset can be read.")
        return examples

    def from_batch(self, loader: DataLoader, number: int) -> Iterator[dict]:
        """
        The batches of this stream's loader from a given one on. Of the pass that a worker is in, the rows before are fetched
        again, but not decoded.

        Args:
            loader: Of this stream.
            number: Of the batch; `positions` are those that the stream had when the batches before had come.
        """
        # A loader takes batch after batch from the workers in turn, and always begins with the first: what is kept are
        # positions between two turns.
        workers = len(self.positions)
        latest = list(self.positions)
        for index, batch in enumerate(loader):
            latest[index % workers] = tuple(batch.pop("position")[-1].tolist())
            if (index + 1) % workers == 0:
                self.positions = list(latest)
            if index >= number % workers:
                yield batch

    def __iter__(self) -> Iterator[dict]:
        """
        The items of one worker, each with its position; without those that are unreadable, where `on_unreadable` is "skip".

        Raises:
            ValueError: If an image is unreadable, or does not fit the crop, or there is none.
        """
        info = get_worker_info()
        worker = 0 if info is None else info.id  # the share gives each files of its own
        # Workers share the memory of a dataset's epoch, and would count it on for each other.
        rows = copy.deepcopy(self.share)
        first_epoch, rows_passed = self.positions[worker]
        for epoch in itertools.count(first_epoch):
            rows.set_epoch(epoch)
            found = False
            for number, row in enumerate(rows):
                if rows_passed:
                    rows_passed -= 1
                    found = True
                    continue
                item = self.reader.read(row, number, f"{self.args.seed}-{epoch}-{self.process}-{worker}-{number}")
                if item is not None:
                    found = True
                    yield {**item, "position": torch.tensor((epoch, number + 1))}
            if not found:
                raise ValueError("Not one image of the dataset can be read.")


def required_class_names(images: LabelledImages | StreamedImages) -> list[str]:
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


def load_images(
    args: argparse.Namespace, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
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
    if args.num_classes is not None and (args.num_classes < 1 or not args.streaming):
        raise ValueError(f"--num_classes {args.num_classes} must be at least 1, and goes with --streaming.")
    for name in ("validation_fraction", "max_train_samples"):
        if args.streaming and getattr(args, name) is not None:
            raise ValueError(f"--{name} needs all images at once, which --streaming does without.")
    train, image_column, label_column = load_rows(args, args.train_split, labelled, args.streaming)
    held_out = None
    if args.validation_split is not None:
        classes = None if label_column is None else train.features[label_column]
        held_out, *_ = load_rows(args, args.validation_split, labelled, False, classes)
    elif args.validation_fraction is not None:
        if not 0 < args.validation_fraction < 1:
            raise ValueError(f"--validation_fraction {args.validation_fraction} is not between 0 and 1.")
        split = train.train_test_split(args.validation_fraction, seed=args.seed, stratify_by_column=label_column)
        train, held_out = split["train"], split["test"]
    if args.max_train_samples is not None:
        if not 1 <= args.max_train_samples <= len(train):
            raise ValueError(f"--max_train_samples {args.max_train_samples} is not in 1 ... {len(train)}.")
        train = train.shuffle(seed=args.seed).select(range(args.max_train_samples))
    if args.streaming:
        if args.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer {args.shuffle_buffer} must be at least 1.")
        if train.num_shards == 1:
            logger.warning(
                "The stream is of one file, or of a folder of images: it is read in its order, which --shuffle_buffer %d alone"
                " mixes. If that is by class, leave --streaming out.",
                args.shuffle_buffer,
            )
        shuffled = train.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        images = StreamedImages(shuffled, image_column, label_column, args)
    else:
        images = LabelledImages(train, image_column, label_column, args, augment=True)
    if held_out is not None:
        held_out = LabelledImages(held_out, image_column, label_column, args, augment=False)
    return images, held_out


def check_source_resolution(source_resolution: int | None, resolution: int | None) -> None:
    """Raises a ValueError unless images of the one can be shrunk to the other."""
    if source_resolution is not None and not (
        resolution is not None and source_resolution > resolution and source_resolution % resolution == 0
    ):
        raise ValueError(
            f"--source_resolution {source_resolution} is not a multiple of --resolution {resolution}, and larger."
        )


def check_workers(args: argparse.Namespace, num_files: int) -> None:
    """Raises a ValueError unless the files of a process's stream can be dealt evenly to the loader's workers."""
    if args.dataloader_num_workers and num_files % args.dataloader_num_workers:
        raise ValueError(
            f"--dataloader_num_workers {args.dataloader_num_workers} does not divide the number of files that each process reads,"
            f" {num_files}: batches come from the workers in turn, and images of some files would be seen more often."
        )


def load_rows(
    args: argparse.Namespace, split: str, labelled: bool, streaming: bool, classes: ClassLabel | None = None
) -> tuple[Dataset | IterableDataset, str, str | None]:
    """
    A split's rows, and the names of their image and label columns; the latter is `None` without labels.

    Args:
        args: Parsed `add_source_arguments`, with a `dataset_name` or a `train_data_dir`.
        split: Of the dataset.
        labelled: Whether to look for labels.
        streaming: Whether to leave the rows where they are; `args.streaming` says that of the dataset.
        classes: What the labels must be; those of the split itself by default.

    Raises:
        ValueError: If there is no such column, some labels are missing or of other classes, or `source_resolution` is no
            multiple of `resolution`.
        DatasetNotFoundError: If there is no such dataset.
    """
    check_source_resolution(args.source_resolution, args.resolution)
    source = (
        {"path": "imagefolder", "data_dir": args.train_data_dir}
        if args.dataset_name is None
        else {"path": args.dataset_name, "name": args.dataset_config_name, "revision": args.dataset_revision}
    )
    rows = load_dataset(
        **source, data_files=args.data_files, split=split, cache_dir=args.cache_dir, streaming=args.streaming
    )
    if rows.features is None:
        raise ValueError(f"The stream of split {split!r} does not say what columns it has.")
    image_column = args.image_column or _only_column(rows, ImageFeature)
    if image_column not in rows.column_names:
        raise ValueError(f"No image column {image_column!r} among {rows.column_names}: name it by --image_column.")
    rows = rows.cast_column(image_column, ImageFeature(decode=False))
    if args.streaming and not streaming:
        rows = _on_disk(rows)
    if not labelled:
        return rows, image_column, None
    if args.label_from == "filename_prefix":
        if streaming:
            raise ValueError("--label_from filename_prefix needs all names at once, which --streaming does without.")
        return _as_class_label(_label_by_file_name(rows, image_column), "label", classes), image_column, "label"

    label_column = args.label_column or _only_column(rows, ClassLabel)
    if label_column is None and classes is None:
        return rows, image_column, None
    if label_column not in rows.column_names:
        raise ValueError(f"No label column {label_column!r} among {rows.column_names} of split {split!r}.")
    if streaming:
        return _with_known_classes(rows, label_column, args.num_classes), image_column, label_column
    return _as_class_label(rows, label_column, classes), image_column, label_column


def _on_disk(rows: IterableDataset) -> Dataset:
    """All of a stream, for as long as the process lives: without streaming every split of a dataset would be fetched."""
    folder = tempfile.TemporaryDirectory(prefix="held-out-")
    atexit.register(folder.cleanup)
    return Dataset.from_generator(rows.__iter__, features=rows.features, cache_dir=folder.name)


def _with_known_classes(rows: IterableDataset, column: str, num_classes: int | None) -> IterableDataset:
    """The same for a stream, whose labels are not known before they come."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return rows
    if isinstance(feature, Value) and feature.dtype == "string":
        raise ValueError(
            f"Column {column!r} of the stream holds names, of which not all are known: leave --streaming out."
        )
    if num_classes is None:
        raise ValueError(f"Column {column!r} of the stream does not say what classes there are: give --num_classes.")
    return rows.cast_column(column, ClassLabel(num_classes=num_classes))


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
