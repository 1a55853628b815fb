"""Pipelines that ship with this package."""

import os
from importlib.resources import files
from pathlib import Path


DEFAULT_MODEL = "adm-mnist-32"


def shipped_folder(name: str) -> str:
    """
    Returns the folder of a pipeline that ships with this package.

    Raises:
        ValueError: If no pipeline has this name.
    """
    folder = Path(str(files("diffusers_adm.model_cards")))
    names = sorted(index.parent.name for index in folder.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(
            f"The name of a pipeline that ships with this package must be one of {', '.join(names)}, but got {name!r}."
        )
    return str(folder / name)


def name_or_folder(model: str | os.PathLike | None) -> str:
    """
    Returns the folder of a pipeline that is given as `shipped:NAME`. `None` means the default model. Folders, Hub ids and names of
    released checkpoints are returned as they are.

    Raises:
        ValueError: If no pipeline that ships has this name.
    """
    if model is None:
        return shipped_folder(DEFAULT_MODEL)
    prefix, _, name = str(model).partition(":")
    return shipped_folder(name) if prefix.lower() == "shipped" and name else str(model)
