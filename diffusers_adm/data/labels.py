"""Class labels of datasets: numbers, names and parts of file names become one `ClassLabel` column."""

from pathlib import PurePath

from datasets import ClassLabel, Dataset, IterableDataset
from datasets.features import Value

from diffusers_adm.data.images import file_name


MAX_CLASSES = 10**6  # a name is made for each


def as_class_label(rows: Dataset, column: str, classes: ClassLabel | None) -> Dataset:
    """
    Converts class numbers or class names to a `ClassLabel`.

    Args:
        rows: Rows of a split.
        column: Name of the label column.
        classes: Classes that the labels must be of. Those of the split itself by default.

    Raises:
        ValueError: If some images have no label, or one of another class.
    """
    labels, feature = rows.unique(column), rows.features[column]
    if None in labels or (isinstance(feature, ClassLabel) and -1 in labels):
        raise ValueError(f"Some images have no label in column {column!r}.")
    if isinstance(feature, Value) and feature.dtype == "string":
        names = sorted(labels)
    elif isinstance(feature, ClassLabel):
        names = feature.names
    elif all(isinstance(label, int) and 0 <= label < MAX_CLASSES for label in labels):
        names = [str(label) for label in range(max(labels) + 1)]
    else:
        raise ValueError(
            f"Column {column!r} holds {labels[:5]}..., neither names nor class numbers in 0 ... {MAX_CLASSES - 1}."
        )
    classes = classes or ClassLabel(names=names)
    unknown = sorted(set(names) - set(classes.names))
    if unknown or (isinstance(feature, ClassLabel) and feature.names != classes.names):
        raise ValueError(
            f"Classes {(unknown or names)[:5]} of the held-out split are not those of the training split."
        )
    return rows if feature == classes else rows.cast_column(column, classes)


def stream_as_class_label(rows: IterableDataset, column: str, num_classes: int | None) -> IterableDataset:
    """
    Converts the class numbers of a stream to a `ClassLabel`. Its labels are not known before they come.

    Raises:
        ValueError: If the column holds names, or the number of classes is not known.
    """
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


def label_by_file_name(rows: Dataset, image_column: str) -> Dataset:
    """
    Adds a column `label`, the part of each image's file name before the first `_`.

    Raises:
        ValueError: If a name has no `_`.
    """
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
