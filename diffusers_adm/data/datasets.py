"""Labelled images from any source that `datasets.load_dataset` supports."""

import atexit
import dataclasses
import itertools
import logging
import os
import tempfile
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets import Image as ImageFeature
from pyarrow import ArrowException

from diffusers_adm.data.folders import find_layout
from diffusers_adm.data.images import NO_READABLE_IMAGE, Columns, ImageReader
from diffusers_adm.data.labels import MAX_CLASSES, as_class_label, label_by_file_name, stream_as_class_label
from diffusers_adm.data.options import ImageFormat, ImageSelection, ImageSource
from diffusers_adm.data.streams import StreamedImages


logger = logging.getLogger(__name__)


class LabelledImages(torch.utils.data.Dataset):
    """
    Labelled images of one split.

    The random crop and flip of an image depend only on the seed, the epoch and the index of the image. The number of workers and
    interruptions have no effect.

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
        """Sets the epoch, which changes the random crops and flips."""
        self.epoch = epoch

    def examples(self, count: int) -> list[dict]:
        """Returns `count` evenly spaced items without augmentation, or all items if there are fewer."""
        plain = LabelledImages(self.rows, dataclasses.replace(self.reader, augment=False), self.seed)
        count = min(count, len(plain))
        return [plain[i * len(plain) // count] for i in range(count)]

    def __getitem__(self, index: int) -> dict:
        """
        Returns the item at an index. If its image is unreadable and `on_unreadable` is `"skip"`, returns the next readable item.

        Raises:
            ValueError: If the image is unreadable, or does not fit the crop.
        """
        if index >= len(self):
            raise IndexError(index)
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            item = self.reader.read(self.rows[candidate], candidate, f"{self.seed}-{self.epoch}-{candidate}")
            if item is not None:
                return item
        raise ValueError(NO_READABLE_IMAGE)


def required_class_names(images: LabelledImages | StreamedImages) -> list[str]:
    """
    Returns the names of the classes.

    Raises:
        ValueError: If there are no labels, or there is a single class.
    """
    if images.class_names is None:
        raise ValueError(
            "The dataset has no labels. Pass --label_column or --label_from, make two or more subfolders, or train an unconditional UNet with"
            " --no-class_conditional."
        )
    if len(images.class_names) < 2:
        raise ValueError(
            f"The dataset must have at least 2 classes, but all images have the class {images.class_names[0]!r}."
        )
    return images.class_names


def load_images(
    source: ImageSource, format: ImageFormat, selection: ImageSelection, *, seed: int, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
    """
    Loads the training images and the held-out images.

    Args:
        source: Place of the dataset.
        format: Size and channels of the images.
        selection: Splits, order and augmentation of the images.
        seed: Seed of the selection, the order, and random crops and flips.
        labelled: Whether to look for labels.

    Returns:
        Training images and held-out images. The latter are `None` if no images are held out.

    Raises:
        ValueError: If the split or a column does not exist, some labels are missing, or the held-out split has other classes.
        DatasetNotFoundError: If the dataset does not exist.
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
        fraction = selection.validation_fraction
        try:
            split = train.train_test_split(fraction, seed=seed, stratify_by_column=columns.label)
        except ValueError as error:
            raise ValueError(
                f"--validation_fraction {fraction} cannot hold out images of each class. Pass another fraction, or --validation_split."
                f" {error}"
            ) from error
        train, held_out = split["train"], split["test"]
    if selection.max_train_samples is not None:
        if not 1 <= selection.max_train_samples <= len(train):
            raise ValueError(
                f"--max_train_samples must be in [1, {len(train)}], the number of images, but got {selection.max_train_samples}."
            )
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
        raise ValueError("Pass exactly one of --dataset_name and --train_data_dir.")
    if source.dataset_name is None and source.dataset_config_name is not None:
        raise ValueError(f"--dataset_config_name requires --dataset_name, but got {source.dataset_config_name}.")
    if selection.validation_split is not None and selection.validation_fraction is not None:
        raise ValueError("Pass at most one of --validation_split and --validation_fraction.")
    if selection.num_classes is not None and not (1 <= selection.num_classes <= MAX_CLASSES and selection.streaming):
        raise ValueError(
            f"--num_classes requires --streaming and must be in [1, {MAX_CLASSES}], but got {selection.num_classes}."
        )
    for name in ("validation_fraction", "max_train_samples"):
        if selection.streaming and getattr(selection, name) is not None:
            raise ValueError(
                f"--{name} requires all images in advance and is not supported with --streaming. Leave one out."
            )
    if selection.validation_fraction is not None and not 0 < selection.validation_fraction < 1:
        raise ValueError(f"--validation_fraction must be between 0 and 1, but got {selection.validation_fraction}.")
    if selection.streaming and selection.shuffle_buffer < 1:
        raise ValueError(f"--shuffle_buffer must be at least 1, but got {selection.shuffle_buffer}.")


def shuffled_stream(rows: IterableDataset, seed: int, shuffle_buffer: int) -> IterableDataset:
    """Shuffles a stream, and warns if the stream can only be shuffled within a buffer."""
    if rows.num_shards == 1:
        logger.warning(
            "The stream has a single file or is a folder of images, so it is read in order and shuffled only by"
            " --shuffle_buffer %d. If images are sorted by class, leave out --streaming.",
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
        classes: Classes that the split must have. Default: any classes.

    Raises:
        ValueError: If a column does not exist, some labels are missing, or the split has other classes.
        DatasetNotFoundError: If the dataset does not exist.
    """
    rows = _load_split(source, split, streaming)
    if rows.features is None:
        raise ValueError(f"The stream of split {split!r} has no list of its columns. Leave out --streaming.")
    image_column = source.image_column or _only_column(rows, ImageFeature)
    if image_column not in rows.column_names:
        raise ValueError(f"--image_column must be one of {rows.column_names}, but got {image_column!r}.")
    try:
        rows = rows.cast_column(image_column, ImageFeature(decode=False))
    except ArrowException as error:
        raise ValueError(
            f"--image_column must be a column of images, but {image_column!r} holds {rows.features[image_column]}."
        ) from error
    label_column = None
    if labelled and source.label_from == "filename_prefix":
        if isinstance(rows, IterableDataset):
            raise ValueError(
                "--label_from filename_prefix requires all file names and is not supported with --streaming."
            )
        rows, label_column = label_by_file_name(rows, image_column), "label"
    elif labelled:
        label_column = source.label_column or _only_column(rows, ClassLabel)
    has_labels = labelled and not (label_column is None and classes is None)
    others = [name for name in rows.column_names if name != image_column]
    if has_labels and label_column not in others:
        raise ValueError(
            f"--label_column must be one of the other columns of split {split!r}, {others}, but got {label_column!r}."
        )
    # Others, such as masks, would be decoded too.
    rows = rows.select_columns([image_column, label_column] if has_labels else [image_column])
    if streaming and on_disk:
        rows = _on_disk(rows, source.cache_dir)
    if not has_labels:
        return rows, Columns(image_column)
    if isinstance(rows, IterableDataset):
        rows = stream_as_class_label(rows, label_column, num_classes)
    else:
        rows = as_class_label(rows, label_column, classes)
    return rows, Columns(image_column, label_column, rows.features[label_column].names)


def _load_split(source: ImageSource, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Loads a split. This package assigns the images of a local folder to splits, because `load_dataset` would guess."""
    options = {"split": split, "cache_dir": source.cache_dir, "streaming": streaming}
    folder = source.train_data_dir or source.dataset_name
    if source.dataset_revision is not None and Path(folder).is_dir():
        raise ValueError(
            f"--dataset_revision requires a dataset on the Hub, but got {source.dataset_revision} for the folder {folder}."
        )
    given = source.train_data_dir
    if given is not None and "://" not in given and not Path(given).is_dir():
        raise ValueError(f"--train_data_dir must be a folder of images, but there is no folder {given}.")
    explicit = source.data_files is not None or source.dataset_config_name is not None
    layout = None if explicit else find_layout(folder, images_only=given is not None)
    if layout is not None:
        if layout.splits:
            logger.warning("%s has the split folders %s. Split %s is used.", folder, layout.splits, split)
        rows = load_dataset(**layout.arguments(), **options)
        if not streaming:
            layout.check_number(sum(info.num_examples for info in rows.info.splits.values()))
        return rows
    name = source.dataset_name
    if name is not None and source.data_files is None and Path(name).is_dir():
        name = os.path.abspath(name)  # the fingerprint of the dataset must not depend on the spelling of the path
    place = (
        {"path": "imagefolder", "data_dir": source.train_data_dir}
        if name is None
        else {"path": name, "name": source.dataset_config_name, "revision": source.dataset_revision}
    )
    return load_dataset(**place, data_files=source.data_files, **options)


def _on_disk(rows: IterableDataset, cache_dir: str | None) -> Dataset:
    """Saves a stream until the process ends. Loading the split without streaming would download all splits of the dataset."""
    if cache_dir is not None:
        os.makedirs(cache_dir, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="held-out-", dir=cache_dir)
    atexit.register(folder.cleanup)
    return Dataset.from_generator(rows.__iter__, features=rows.features, cache_dir=folder.name)


def _only_column(rows: Dataset, feature_type: type) -> str | None:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, feature_type)]
    if len(columns) > 1:
        option = "--image_column" if feature_type is ImageFeature else "--label_column"
        raise ValueError(
            f"{option} is required, because several columns are of type {feature_type.__name__}: {columns}."
        )
    return columns[0] if columns else None
