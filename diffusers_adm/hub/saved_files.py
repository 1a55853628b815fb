"""The form of a saved pipeline's folder: code files beside the weights, and an index that names them."""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path

from diffusers.utils.torch_utils import unwrap_module

from diffusers_adm.atomic_files import write_json


# Classes of this package that a pipeline may hold, and what their files are called.
SAVED_CLASSES = {
    "ClassifierGuidedPipeline": "pipeline_adm",
    "ADMUpsamplePipeline": "pipeline_adm_upsample",
    "ADMUNet2DModel": "unet_adm",
    "NoisyClassifier": "noisy_classifier",
}
# What the files of another version are called; a push takes them away.
CODE_PATTERNS = [f"{place}{stem}_*.py" for stem in SAVED_CLASSES.values() for place in ("", "*/")]


def write_code(pipeline, folder: Path) -> None:
    """Adds the code files to a folder that was just saved: those that the classes themselves came from."""
    add_code(pipeline, folder, lambda cls: Path(inspect.getfile(cls)).read_text(encoding="utf-8"))


def add_code(pipeline, folder: Path, source: Callable[[type], str]) -> None:
    """
    Adds code files, and names them in the index. A class that a user has derived keeps the entry that diffusers gave it.

    Args:
        pipeline: What was saved.
        folder: Where.
        source: Of a class.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if type(pipeline).__name__ in SAVED_CLASSES:
        index["_class_name"] = add_file(type(pipeline), folder, source)
    for name, component in pipeline.components.items():
        cls = type(unwrap_module(component))  # of a compiled one, the model's
        if cls.__name__ in SAVED_CLASSES:
            index[name] = add_file(cls, folder / name, source)
    write_json(folder / "model_index.json", index, sort_keys=True)


def add_file(cls: type, folder: Path, source: Callable[[type], str]) -> list[str]:
    """Writes a class's file; what the index says of it."""
    text = source(cls)
    # Files of one name from two repositories would take each other's place where diffusers keeps them.
    stem = f"{SAVED_CLASSES[cls.__name__]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for old in folder.glob(f"{SAVED_CLASSES[cls.__name__]}_*.py"):
        old.unlink()
    (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return [stem, cls.__name__]
