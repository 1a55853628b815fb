"""Names of the checkpoints of a run."""

import re
from pathlib import Path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders `checkpoint-N` in the order of their steps. Folders with other names, such as copies, are left out."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step N of a folder `checkpoint-N`."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
