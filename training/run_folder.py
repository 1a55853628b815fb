"""Folder of a run: one run at a time may use it, and nothing of earlier runs is mixed with its files."""

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
from diffusers_adm.training.options import TrainingOptions


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = get_logger(__name__)

LOCK = ".lock"
UNFINISHED = re.compile(r"(partial|old)-(checkpoint-\d+|pipeline|pipeline-ema-.+|classifier|push|\d+-.+)")


@contextlib.contextmanager
def reserved_folder(options: TrainingOptions, accelerator: Accelerator) -> Iterator[None]:
    """
    Reserves `--output_dir` for this run, for as long as the context lasts, and removes what killed runs left half written. A
    dry run only checks whether the folder is free.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run, whose main process reserves the folder for all.

    Raises:
        ValueError: The folder cannot be written to, or another run uses it.
    """
    folder = options.output.output_dir
    if not accelerator.is_main_process:
        yield
        return
    check_writable(folder)
    if options.dry_run:
        if (folder / LOCK).exists():
            with locked(folder):
                pass
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remove_unfinished(folder)
        yield


def check_writable(folder: Path) -> None:
    """Raises a ValueError if a folder is none, or neither it nor the folder that it would be made in can be written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"--output_dir {folder} cannot be made, because {existing} is not a folder: give another one."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to: give another one.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Locks a folder for this process, for as long as the context lasts.

    Raises:
        ValueError: Another process has locked it.
    """
    with open(folder / LOCK, "a+") as file:  # "a": what the owner wrote stays until the lock is gained
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
        # A lock of the process, which the system frees when it ends. That of `flock`, which `filelock` takes, passes to
        # forked workers, which outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(
            f"--output_dir {folder} is used by another run ({file.read() or 'unknown'}): wait until it ends, or give another"
            " folder."
        ) from error
    except OSError as error:
        logger.warning("Cannot lock %s: %s. Start no other run in it.", folder, error)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed runs left half written or half removed. A folder that was about to be replaced gets its name back."""
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
    """Renames metrics and pictures of an earlier run that left no checkpoint, so that those of a new run do not mix with them."""
    found = [path for path in (folder / "metrics.jsonl", folder / "samples") if path.exists()]
    if not found:
        return
    number = 1
    while any((folder / f"{path.stem}-{number}{path.suffix}").exists() for path in found):
        number += 1
    for path in found:
        kept = path.with_name(f"{path.stem}-{number}{path.suffix}")
        os.replace(path, kept)
        logger.warning("%s is of an earlier run: it is kept as %s.", path, kept.name)
