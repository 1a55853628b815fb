"""Format of a saved pipeline's folder: code files beside the weights, and an index that names them."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

from diffusers.utils.torch_utils import unwrap_module

from diffusers_adm.atomic_files import write_json


# Classes of this package that a pipeline may hold, and the stems of their files' names.
SAVED_CLASSES = {
    "ClassifierGuidedPipeline": "pipeline_adm",
    "ADMUpsamplePipeline": "pipeline_adm_upsample",
    "ADMUNet2DModel": "unet_adm",
    "NoisyClassifier": "noisy_classifier",
}
# Files of another version, which a push deletes.
CODE_PATTERNS = [f"{place}{stem}_*.py" for stem in SAVED_CLASSES.values() for place in ("", "*/")]


def check_variant(variant: str | None) -> None:
    """Raises a ValueError if a variant cannot be a part of a file's name."""
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise ValueError(
            f"The variant must be a part of a file's name, of letters, digits, '_', '-' and '.', such as fp16, but got"
            f" {variant!r}."
        )


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
