"""Card, code files and index in the folder of a saved pipeline."""

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusers.utils.torch_utils import unwrap_module

from diffusers_adm.atomic_files import atomic_write, write_json


# Classes of this package that are saved with their code, and the beginnings of the names of their code files.
SAVED_CLASSES = {
    "ClassifierGuidedPipeline": "pipeline_adm",
    "ADMUpsamplePipeline": "pipeline_adm_upsample",
    "ADMUNet2DModel": "unet_adm",
    "NoisyClassifier": "noisy_classifier",
}
# Digits at the end of the name of a code file. Files of other names belong to the user.
CODE_HASH = "[0-9a-f]" * 8
# Code files that a push deletes, because they may be of another version.
CODE_PATTERNS = [
    f"{place}{stem}_{CODE_HASH}.py" for stem in SAVED_CLASSES.values() for place in ("", "unet/", "classifier/")
]
CARD_FILE = "README.md"
# Link of a card to a picture in its folder. The path cannot lead out of the folder.
PICTURE_LINK = re.compile(r"!\[[^\]]*\]\(((?:\w[\w.-]*/)*\w[\w.-]*\.(?:png|jpe?g|gif|webp))\)")


def check_variant(variant: str | None) -> None:
    """Raises a ValueError if a variant cannot be part of a file name."""
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(
            f"The variant must consist of letters, digits, '_', '-' and '.', such as fp16, but got {variant!r}."
        )


def save_card(model, folder: str | os.PathLike) -> None:
    """Copies the card of the folder that a pipeline or model was loaded from, unless the new folder has a card."""
    if not (Path(folder) / CARD_FILE).exists():
        copy_card(model, Path(folder))


def copy_card(model, folder: Path) -> bool:
    """Copies the card of the folder that a pipeline or model was loaded from, with its pictures. Returns whether there is a card."""
    name = model.config.get("_name_or_path")
    if not name:
        return False  # a new model
    source = Path(name)
    # A component is also loaded from the folder of its pipeline, but the card there describes the pipeline.
    if not all((source / file).is_file() for file in (CARD_FILE, model.config_name)):
        return False
    for file in [*card_pictures(source), CARD_FILE]:
        if (source / file).is_file() and not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / file) as partial:
                shutil.copyfile(source / file, partial)
    return True


def card_pictures(folder: Path) -> list[str]:
    """Returns the relative paths of the pictures in a folder's card."""
    card = folder / CARD_FILE
    return PICTURE_LINK.findall(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []


def write_code(pipeline, folder: Path) -> None:
    """Copies the code files from which the classes of a pipeline were loaded to a folder that was just saved."""
    add_code(pipeline, folder, lambda cls: Path(inspect.getfile(cls)).read_text(encoding="utf-8"))


def add_code(pipeline, folder: Path, source: Callable[[type], str]) -> None:
    """
    Adds code files to a folder, and enters them in its index. A class that a user has derived keeps the entry that diffusers wrote.

    Args:
        pipeline: Pipeline that was saved.
        folder: Folder of the saved pipeline.
        source: Function that returns the source of the code file of a class.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if type(pipeline).__name__ in SAVED_CLASSES:
        index["_class_name"] = add_file(type(pipeline), folder, source)
    for name, component in pipeline.components.items():
        cls = type(unwrap_module(component))  # a compiled model is a wrapper of another class
        if cls.__name__ in SAVED_CLASSES:
            index[name] = add_file(cls, folder / name, source)
    write_json(folder / "model_index.json", index, sort_keys=True)


def add_file(cls: type, folder: Path, source: Callable[[type], str]) -> list[str]:
    """Writes the code file of a class. Returns its entry in the index."""
    text = source(cls)
    # The name has a hash of the content, because diffusers keeps the code files of all repositories in one folder.
    stem = f"{SAVED_CLASSES[cls.__name__]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for old in folder.glob(f"{SAVED_CLASSES[cls.__name__]}_{CODE_HASH}.py"):
        old.unlink()
    (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return [stem, cls.__name__]
