"""Conversion of class labels to a `ClassLabel` column. Labels are numbers, names or the beginnings of file names."""

import logging
from pathlib import PurePath

from datasets import ClassLabel, Dataset, IterableDataset
from datasets.features import Value
from datasets.features.features import FeatureType

from diffusers_adm.data.images import file_name


logger = logging.getLogger(__name__)

MAX_CLASSES = 10**6  # a limit, because each class is given a name


def holds_names(feature: FeatureType) -> bool:
    """Returns whether a column holds text."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def as_class_label(rows: Dataset, column: str, classes: ClassLabel | None) -> Dataset:
    """
    Converts class numbers or class names to a `ClassLabel`.

    Args:
        rows: Rows of a split.
        column: Name of the label column.
        classes: Classes that the split must have. Default: any classes.

    Raises:
        ValueError: If some images have no label, or the split has other classes.
    """
    feature = rows.features[column]
    if not isinstance(feature, (ClassLabel, Value)):
        raise ValueError(f"Labels must be names or class numbers, but column {column!r} holds {feature}.")
    labels = rows.unique(column)
    if None in labels or (isinstance(feature, ClassLabel) and -1 in labels):
        raise ValueError(f"All images must have a label, but column {column!r} lacks some.")
    if holds_names(feature):
        names = sorted(labels)
    elif isinstance(feature, ClassLabel):
        names = feature.names
    elif all(isinstance(label, int) and 0 <= label < MAX_CLASSES for label in labels):
        names = [str(label) for label in range(max(labels) + 1)]
        without_images = sorted(set(range(len(names))) - set(labels))
        if without_images and classes is None:
            logger.warning(
                "The classes are 0 to %d, but column %r has no images of %d of them, such as %d. If this is not meant, number the classes"
                " from 0 without gaps.",
                max(labels), column, len(without_images), without_images[0],
            )  # fmt: skip
    else:
        raise ValueError(
            f"Labels must be names or class numbers in [0, {MAX_CLASSES - 1}], but column {column!r} holds {labels[:5]}..."
        )
    classes = classes or ClassLabel(names=names)
    unknown = sorted(set(names) - set(classes.names))
    if unknown or (isinstance(feature, ClassLabel) and feature.names != classes.names):
        raise ValueError(
            f"The held-out split must have the classes of the training split, but has {(unknown or names)[:5]}."
        )
    return rows if feature == classes else rows.cast_column(column, classes)


def stream_as_class_label(rows: IterableDataset, column: str, num_classes: int | None) -> IterableDataset:
    """
    Converts the class numbers of a stream to a `ClassLabel`. The labels of a stream are not known in advance.

    Raises:
        ValueError: If the column holds names, or the number of classes is unknown.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return rows
    if holds_names(feature):
        raise ValueError(
            f"Labels of a stream must be class numbers, but column {column!r} holds names. Leave out --streaming."
        )
    if num_classes is None:
        raise ValueError(
            f"--num_classes is required, because column {column!r} of the stream has no list of its classes."
        )
    return rows.cast_column(column, ClassLabel(num_classes=num_classes))


def label_by_file_name(rows: Dataset, image_column: str) -> Dataset:
    """
    Adds a column `label` with the part of each image's file name before the first `_`.

    Raises:
        ValueError: If a file name has no `_`.
    """
    names = [file_name(value, index) for index, value in enumerate(rows[image_column])]
    without = [name for name in names if "_" not in PurePath(name).name]
    if without:
        raise ValueError(
            f"--label_from filename_prefix requires an _ in all file names, but {len(without)} have none, such as {without[0]!r}."
        )
    prefixes = [PurePath(name).name.split("_")[0] for name in names]
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    return rows.add_column("label", prefixes)
