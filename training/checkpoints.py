"""Folders that are there whole or not at all."""

import os
import re
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin

from diffusers_adm.hub.bundle import save_model


def save_whole(model: ModelMixin | DiffusionPipeline, folder: Path) -> None:
    """Saves under another name, then renames: whoever reads the folder finds all of it, code included."""
    partial = partial_name(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(model, DiffusionPipeline):
        model.save_pretrained(partial)
    else:
        save_model(model, partial)
    flush(partial)
    replace_folder(partial, folder)


def partial_name(folder: Path) -> Path:
    """What a folder is called while it is written."""
    return folder.with_name("partial-" + folder.name)


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts a finished and flushed folder in the place of another, which is removed last."""
    old = folder.with_name("old-" + folder.name)
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed before it came to that
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _flush_one(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Waits until all of a folder is on the disk: a name may reach it before what it names."""
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N`, by their steps; others, such as copies of them, are none of ours."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The N of `checkpoint-N`."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(folder: Path, limit: int, keep_every: int | None) -> None:
    """Leaves the latest `limit`, and those of multiples of `keep_every`; clears away what was never finished."""
    temporary = [
        path for path in list_checkpoints(folder) if keep_every is None or checkpoint_step(path) % keep_every != 0
    ]
    unfinished = (*folder.glob("partial-checkpoint-*"), *folder.glob("old-checkpoint-*"))
    for path in (*temporary[:-limit], *unfinished):
        shutil.rmtree(path)
