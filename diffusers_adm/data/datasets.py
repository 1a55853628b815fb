"""Labelled images of everything that `datasets.load_dataset` reads."""

import atexit
import dataclasses
import itertools
import logging
import tempfile
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets import Image as ImageFeature
from pyarrow import ArrowException

from diffusers_adm.data.folders import find_layout
from diffusers_adm.data.images import Columns, ImageFormat, ImageReader
from diffusers_adm.data.labels import MAX_CLASSES, as_class_label, label_by_file_name, stream_as_class_label
from diffusers_adm.data.options import ImageSelection, ImageSource
from diffusers_adm.data.streams import StreamedImages


logger = logging.getLogger(__name__)


class LabelledImages(torch.utils.data.Dataset):
    """
    Labelled images of one split.

    Random crops and flips of an image depend on the seed, the epoch and the image's index alone, and neither on the number of
    workers nor on interruptions.

    Args:
        rows: Rows of the dataset, with an undecoded image column.
        reader: Conversion of rows to items.
        seed: Seed of random crops and flips.
    """

    def __init__(self, rows: Dataset, reader: ImageReader, seed: int):
        self.rows = rows
        self.reader = reader
        self.seed = seed
        self.epoch = 0

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class in the order of the labels, or `None` without labels."""
        return self.reader.columns.class_names

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Changes the random crops and flips."""
        self.epoch = epoch

    def examples(self, count: int) -> list[dict]:
        """Returns `count` items, or as many as there are, evenly spaced, without augmentation."""
        plain = LabelledImages(self.rows, dataclasses.replace(self.reader, augment=False), self.seed)
        count = min(count, len(plain))
        return [plain[i * len(plain) // count] for i in range(count)]

    def __getitem__(self, index: int) -> dict:
        """
        Returns the item at an index. If its image is unreadable and `on_unreadable` is `"skip"`, it is the next readable one.

        Raises:
            ValueError: If the image is unreadable, or does not fit the crop.
        """
        if index >= len(self):
            raise IndexError(index)
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            item = self.reader.read(self.rows[candidate], candidate, f"{self.seed}-{self.epoch}-{candidate}")
            if item is not None:
                return item
        raise ValueError("No image of the dataset can be read.")


def required_class_names(images: LabelledImages | StreamedImages) -> list[str]:
    """
    Returns the names of the classes.

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
    source: ImageSource, format: ImageFormat, selection: ImageSelection, *, seed: int, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
    """
    Loads the images to train on, and those that are held out.

    Args:
        source: Place of the dataset.
        format: Size and channels of the images.
        selection: Splits, order and state of the images.
        seed: Seed of the selection, the order, and random crops and flips.
        labelled: Whether to look for labels.

    Returns:
        Both. The second is `None` if nothing is held out.

    Raises:
        ValueError: If there is no such split or column, some labels are missing, or a held-out split has other classes.
        DatasetNotFoundError: If there is no such dataset.
    """
    check_selection(source, selection)
    streaming = selection.streaming
    train, columns = load_rows(
        source,
        selection.train_split,
        labelled=labelled,
        streaming=streaming,
        num_classes=selection.num_classes,
    )
    held_out = None
    if selection.validation_split is not None:
        classes = None if columns.label is None else train.features[columns.label]
        held_out, _ = load_rows(
            source, selection.validation_split, labelled=labelled, streaming=streaming, on_disk=True, classes=classes
        )
    elif selection.validation_fraction is not None:
        split = train.train_test_split(selection.validation_fraction, seed=seed, stratify_by_column=columns.label)
        train, held_out = split["train"], split["test"]
    if selection.max_train_samples is not None:
        if not 1 <= selection.max_train_samples <= len(train):
            raise ValueError(f"--max_train_samples {selection.max_train_samples} is not in 1 ... {len(train)}.")
        train = train.shuffle(seed=seed).select(range(selection.max_train_samples))

    reader = ImageReader(columns, format, random_flip=selection.random_flip, on_unreadable=selection.on_unreadable)
    if streaming:
        images = StreamedImages(
            shuffled_stream(train, seed, selection.shuffle_buffer), reader, seed, selection.dataloader_num_workers
        )
    else:
        images = LabelledImages(train, reader, seed)
    if held_out is not None:
        held_out = LabelledImages(held_out, dataclasses.replace(reader, augment=False), seed)
    return images, held_out


def check_selection(source: ImageSource, selection: ImageSelection) -> None:
    """Raises a ValueError if options contradict one another or are out of range."""
    if (source.dataset_name is None) == (source.train_data_dir is None):
        raise ValueError("Give either --dataset_name or --train_data_dir.")
    if source.dataset_name is None and source.dataset_config_name is not None:
        raise ValueError(f"--dataset_config_name {source.dataset_config_name} goes with --dataset_name.")
    if selection.validation_split is not None and selection.validation_fraction is not None:
        raise ValueError("Give either --validation_split or --validation_fraction.")
    if selection.num_classes is not None and not (1 <= selection.num_classes <= MAX_CLASSES and selection.streaming):
        raise ValueError(
            f"--num_classes {selection.num_classes} must be in 1 ... {MAX_CLASSES}, and goes with --streaming."
        )
    for name in ("validation_fraction", "max_train_samples"):
        if selection.streaming and getattr(selection, name) is not None:
            raise ValueError(f"--{name} needs all images at once, which --streaming does without.")
    if selection.validation_fraction is not None and not 0 < selection.validation_fraction < 1:
        raise ValueError(f"--validation_fraction {selection.validation_fraction} is not between 0 and 1.")
    if selection.streaming and selection.shuffle_buffer < 1:
        raise ValueError(f"--shuffle_buffer {selection.shuffle_buffer} must be at least 1.")


def shuffled_stream(rows: IterableDataset, seed: int, shuffle_buffer: int) -> IterableDataset:
    """Shuffles a stream, and warns if that cannot mix the order of its rows well."""
    if rows.num_shards == 1:
        logger.warning(
            "The stream is of one file, or of a folder of images: it is read in its order, which --shuffle_buffer %d alone"
            " mixes. If that is by class, leave --streaming out.",
            shuffle_buffer,
        )
    return rows.shuffle(seed=seed, buffer_size=shuffle_buffer)


def load_rows(
    source: ImageSource,
    split: str,
    *,
    labelled: bool,
    streaming: bool = False,
    on_disk: bool = False,
    num_classes: int | None = None,
    classes: ClassLabel | None = None,
) -> tuple[Dataset | IterableDataset, Columns]:
    """
    Returns the rows of a split, with an undecoded image column, and the columns of images and labels.

    Args:
        source: Place of the dataset.
        split: Name of the split.
        labelled: Whether to look for labels.
        streaming: Whether to fetch this split alone, as a stream.
        on_disk: Whether to write the stream to the disk, as a dataset.
        num_classes: Number of classes of a stream whose labels are numbers without names.
        classes: Classes that the labels must be of. Those of the split itself by default.

    Raises:
        ValueError: If there is no such column, or some labels are missing or of other classes.
        DatasetNotFoundError: If there is no such dataset.
    """
    rows = _load_split(source, split, streaming)
    if rows.features is None:
        raise ValueError(f"The stream of split {split!r} does not say what columns it has.")
    image_column = source.image_column or _only_column(rows, ImageFeature)
    if image_column not in rows.column_names:
        raise ValueError(f"No image column {image_column!r} among {rows.column_names}: name it by --image_column.")
    try:
        rows = rows.cast_column(image_column, ImageFeature(decode=False))
    except ArrowException as error:
        raise ValueError(
            f"Column {image_column!r} holds {rows.features[image_column]}, not images: name another by --image_column."
        ) from error
    if streaming and on_disk:
        rows = _on_disk(rows)
    if not labelled:
        return rows, Columns(image_column)

    is_stream = isinstance(rows, IterableDataset)
    if source.label_from == "filename_prefix":
        if is_stream:
            raise ValueError("--label_from filename_prefix needs all names at once, which --streaming does without.")
        rows, label_column = label_by_file_name(rows, image_column), "label"
    else:
        label_column = source.label_column or _only_column(rows, ClassLabel)
    if label_column is None and classes is None:
        return rows, Columns(image_column)
    if label_column not in rows.column_names:
        raise ValueError(f"No label column {label_column!r} among {rows.column_names} of split {split!r}.")
    if is_stream:
        rows = stream_as_class_label(rows, label_column, num_classes)
    else:
        rows = as_class_label(rows, label_column, classes)
    return rows, Columns(image_column, label_column, rows.features[label_column].names)


def _load_split(source: ImageSource, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Loads a split. Which images of a local folder are in it is decided here, because `load_dataset` would guess."""
    options = {"split": split, "cache_dir": source.cache_dir, "streaming": streaming}
    folder = source.train_data_dir or source.dataset_name
    if source.dataset_revision is not None and Path(folder).is_dir():
        raise ValueError(
            f"--dataset_revision {source.dataset_revision} is for datasets on the Hub, but {folder} is a folder."
        )
    explicit = source.data_files is not None or source.dataset_config_name is not None
    layout = None if explicit else find_layout(folder)
    if layout is not None:
        if layout.splits:
            logger.warning("%s has the split folders %s: reading split %s.", folder, layout.splits, split)
        rows = load_dataset(**layout.arguments(), **options)
        if not streaming:
            layout.check_number(sum(info.num_examples for info in rows.info.splits.values()))
        return rows
    place = (
        {"path": "imagefolder", "data_dir": source.train_data_dir}
        if source.dataset_name is None
        else {"path": source.dataset_name, "name": source.dataset_config_name, "revision": source.dataset_revision}
    )
    return load_dataset(**place, data_files=source.data_files, **options)


def _on_disk(rows: IterableDataset) -> Dataset:
    """Saves a stream for as long as the process lives: without streaming every split of a dataset would be fetched."""
    folder = tempfile.TemporaryDirectory(prefix="held-out-")
    atexit.register(folder.cleanup)
    return Dataset.from_generator(rows.__iter__, features=rows.features, cache_dir=folder.name)


def _only_column(rows: Dataset, feature_type: type) -> str | None:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, feature_type)]
    if len(columns) > 1:
        raise ValueError(f"Columns {columns} are all of type {feature_type.__name__}: name the one to use.")
    return columns[0] if columns else None
