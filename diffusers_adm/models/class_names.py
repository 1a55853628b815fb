"""Names of classes in configs. Each class number has one text, in which commas separate synonyms."""

import unicodedata
from numbers import Integral


def numbered_names(id2label: dict | None, num_classes: int | None = None) -> dict[int, str] | None:
    """
    Returns the names of classes with integers as keys. In a saved config the keys are strings, because JSON allows only strings.

    Args:
        id2label: Name of each class by its number.
        num_classes: Number of classes. `None` if it is unknown.

    Raises:
        ValueError: If a key is not the number of a class, or a value is not a string.
    """
    if id2label is None:
        return None
    if not isinstance(id2label, dict):
        raise ValueError(f"`id2label` must be a dict of class numbers and names, but got {type(id2label).__name__}.")
    names = {}
    for key, name in id2label.items():
        is_number = isinstance(key, Integral) or (isinstance(key, str) and key.isdecimal())
        label = int(key) if is_number else -1
        if label < 0 or (num_classes is not None and label >= num_classes):
            known = "" if num_classes is None else f" below {num_classes}"
            raise ValueError(f"`id2label` must have class numbers{known} as keys, but got the key {key!r}.")
        if not isinstance(name, str):
            raise ValueError(f"`id2label` must have strings as values, but got for class {label} {name!r}.")
        names[label] = name
    return names


def composed(text: str) -> str:
    """Returns a text with each accented letter as one character. In names of folders on a Mac, the accent is a character of its own."""
    return unicodedata.normalize("NFC", text)


def synonyms(names: str) -> set[str]:
    """Returns the names of one class: the whole text, and its parts between commas."""
    names = composed(names)
    return {names.strip(), *(part.strip() for part in names.split(","))}


def check_same_classes(ours: dict[int, str], theirs: dict[int, str]) -> None:
    """
    Checks that the UNet and the classifier have the same classes: the two names of each class must share a synonym, in upper or lower
    case.

    Args:
        ours: Names of the UNet's classes.
        theirs: Names of the classifier's classes.

    Raises:
        ValueError: If the two names of a class share no synonym.
    """
    for label in sorted(ours.keys() & theirs.keys()):
        if synonyms(ours[label].lower()).isdisjoint(synonyms(theirs[label].lower())):
            raise ValueError(
                f"The classes of UNet and classifier differ: class {label} is {ours[label]!r} for the UNet and"
                f" {theirs[label]!r} for the classifier. Train both on the same classes in the same order. If only the names"
                " differ, load the classifier with id2label=None."
            )
