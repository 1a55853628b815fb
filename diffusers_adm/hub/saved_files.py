"""Format of a saved pipeline's folder: a card, code files beside the weights, and an index that names them."""

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


# Classes of this package that a pipeline may hold, and the stems of their files' names.
SAVED_CLASSES = {
    "ClassifierGuidedPipeline": "pipeline_adm",
    "ADMUpsamplePipeline": "pipeline_adm_upsample",
    "ADMUNet2DModel": "unet_adm",
    "NoisyClassifier": "noisy_classifier",
}
# Files of another version, which a push deletes.
CODE_PATTERNS = [f"{place}{stem}_*.py" for stem in SAVED_CLASSES.values() for place in ("", "*/")]
CARD_FILE = "README.md"
# Link of a card to a picture of its folder, by a path that cannot lead out of it.
PICTURE_LINK = re.compile(r"!\[[^\]]*\]\(((?:\w[\w.-]*/)*\w[\w.-]*\.(?:png|jpe?g|gif|webp))\)")


def check_variant(variant: str | None) -> None:
    """Raises a ValueError if a variant cannot be a part of a file's name."""
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(
            f"The variant must be a part of a file's name, of letters, digits, '_', '-' and '.', such as fp16, but got"
            f" {variant!r}."
        )


def save_card(model, folder: str | os.PathLike) -> None:
    """Adds the card of the folder that a pipeline or model was loaded from. A card that the folder has is kept."""
    if not (Path(folder) / CARD_FILE).exists():
        copy_card(model, Path(folder))


def copy_card(model, folder: Path) -> bool:
    """Copies the card of the folder that a pipeline or model was loaded from, with its pictures. Returns whether there is one."""
    source = Path(model.config.get("_name_or_path") or "")
    # A part of a pipeline is loaded from the pipeline's folder too, whose card is not the part's.
    if not all((source / file).is_file() for file in (CARD_FILE, model.config_name)):
        return False
    for file in [*card_pictures(source), CARD_FILE]:
        if (source / file).is_file() and not (folder / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / file) as partial:
                shutil.copyfile(source / file, partial)
    return True


def card_pictures(folder: Path) -> list[str]:
    """Returns the relative paths of the pictures that a folder's card shows."""
    card = folder / CARD_FILE
    return PICTURE_LINK.findall(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []


def write_code(pipeline, folder: Path) -> None:
    """Adds the code files to a folder that was just saved: the files that the classes were loaded from."""
    add_code(pipeline, folder, lambda cls: Path(inspect.getfile(cls)).read_text(encoding="utf-8"))


def add_code(pipeline, folder: Path, source: Callable[[type], str]) -> None:
    """
    Adds code files, and names them in the index. A class that a user has derived keeps its entry from diffusers.

    Args:
        pipeline: Pipeline that was saved.
        folder: Folder that it was saved to.
        source: Function that returns the source of a class's file.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if type(pipeline).__name__ in SAVED_CLASSES:
        index["_class_name"] = add_file(type(pipeline), folder, source)
    for name, component in pipeline.components.items():
        cls = type(unwrap_module(component))  # a compiled model hides its class
        if cls.__name__ in SAVED_CLASSES:
            index[name] = add_file(cls, folder / name, source)
    write_json(folder / "model_index.json", index, sort_keys=True)


def add_file(cls: type, folder: Path, source: Callable[[type], str]) -> list[str]:
    """Writes the file of a class, and returns its entry in the index."""
    text = source(cls)
    # Named by its content, because diffusers keeps files of all repositories in one folder.
    stem = f"{SAVED_CLASSES[cls.__name__]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for old in folder.glob(f"{SAVED_CLASSES[cls.__name__]}_*.py"):
        old.unlink()
    (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return [stem, cls.__name__]
