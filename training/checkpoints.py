"""The checkpoints of a run."""

import re
import shutil
from pathlib import Path


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
