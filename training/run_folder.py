"""Folder of a run. Only one run at a time can use it, and files of earlier runs are kept apart."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_adm.atomic_files import naming_write_errors
from diffusers_adm.training.checkpointing import find_checkpoint
from diffusers_adm.training.options import TrainingOptions


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = get_logger(__name__)

LOCK = ".lock"
# Folders that were about to be written or replaced, and files of processes of any machine, see `atomic_write`.
UNFINISHED = re.compile(r"(partial|old)-(checkpoint-\d+|pipeline|pipeline-ema-.+|classifier|push)|partial-.+-\d+-.+")


@contextlib.contextmanager
def reserved_folder(options: TrainingOptions, accelerator: Accelerator) -> Iterator[Path | None]:
    """
    Reserves `--output_dir` for this run inside the context, and removes unfinished files of killed runs. A dry run only checks
    whether the folder is free. Yields the checkpoint to resume from, or `None` for a new run.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run. Its main process reserves the folder for all processes.

    Raises:
        ValueError: If the folder cannot be written to, another run uses it, it holds files of another run, or the checkpoint does not
            exist.
    """
    folder = options.output.output_dir
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            check_writable(folder)
            if options.dry_run and (folder / LOCK).exists():
                with locked(folder):
                    pass
            elif not options.dry_run:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                remove_unfinished(folder)
        yield find_checkpoint(options.output, accelerator)


def check_writable(folder: Path) -> None:
    """Raises a `ValueError` if a folder cannot be written to, or cannot be created."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"--output_dir {folder} cannot be created, because {existing} is not a folder. Pass another folder."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to. Pass another folder.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Locks a folder for this process inside the context.

    Raises:
        ValueError: If another process has locked the folder.
    """
    with open(folder / LOCK, "a+") as file:  # "a+" keeps the text of the current owner
        with naming_write_errors(folder / LOCK):
            _lock(file, folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _lock(file: TextIO, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # The system frees this lock when the process ends. `filelock` uses `flock`, whose lock passes to forked workers, and
        # these outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(
            f"--output_dir {folder} is used by another run ({file.read() or 'unknown'}). Wait until it ends, or pass another"
            " folder."
        ) from error
    except OSError as error:
        logger.warning("Cannot lock %s: %s. Do not start another run in this folder.", folder, error)


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed runs left unfinished. A folder that was about to be replaced gets its name back."""
    for path in folder.iterdir():
        if not (match := UNFINISHED.fullmatch(path.name)):
            continue
        state, name = match.groups()
        if state == "old" and not (folder / name).exists():
            os.replace(path, folder / name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in folder.glob("samples/partial-*"):
        path.unlink()


def set_aside_earlier_run(folder: Path) -> None:
    """Renames metrics and pictures of an earlier run without checkpoints, so that a new run does not mix with them."""
    found = [path for path in (folder / "metrics.jsonl", folder / "samples") if path.exists()]
    if not found:
        return
    number = 1
    while any((folder / f"{path.stem}-{number}{path.suffix}").exists() for path in found):
        number += 1
    for path in found:
        kept = path.with_name(f"{path.stem}-{number}{path.suffix}")
        os.replace(path, kept)
        logger.warning("%s is from an earlier run. It is kept as %s.", path, kept.name)
