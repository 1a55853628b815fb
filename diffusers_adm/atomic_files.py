"""Atomic writing of files and folders. After a crash, either the old or the new version exists completely."""

import contextlib
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


# Begins the names of temporary files. Machines that share a disk have processes of the same number.
_PROCESS_PREFIX = f"partial-{platform.node()}-"


@contextlib.contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Makes errors of writing a file or a folder an `OSError` that names it, because most errors of a full disk name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # errors without a number are custom messages
            error.filename = str(path)
        raise
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """
    Yields a temporary path to write a file to. After the context, the file is flushed to the disk and renamed to `path`.

    Raises:
        OSError: If the file cannot be written. The message names the file.
    """
    remove_partial_files(path.parent, path.name)
    partial = path.with_name(f"{_PROCESS_PREFIX}{os.getpid()}-{path.name}")
    try:
        with naming_write_errors(path):
            yield partial
            _flush_path(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path, name: str | None = None) -> None:
    """
    Removes the temporary files of a folder whose processes, on this machine, were killed.

    Args:
        folder: Folder of the files.
        name: Name of the file whose temporary files are removed. `None` means all files.
    """
    for partial in folder.glob(f"{glob.escape(_PROCESS_PREFIX)}*"):
        process, _, final = partial.name.removeprefix(_PROCESS_PREFIX).partition("-")
        if name in (None, final) and process.isdecimal() and not _is_running(int(process)):
            partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":
        return True  # a signal would end the process there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # a process of another user
    return True


def check_can_write(path: Path) -> None:
    """
    Checks that a file can be written, so that an error comes before long work and not after it.

    Raises:
        ValueError: If the path is a folder or a device, or its folder does not exist.
        OSError: If the folder is not writable.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device"
        raise ValueError(f"The output must be a file, but {path} is {kind}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{path.name} cannot be written, because there is no folder {path.absolute().parent}. Create it."
        )
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def write_json(path: Path, content: dict | list, sort_keys: bool = False) -> None:
    """
    Writes a JSON file.

    Args:
        path: File to write.
        content: Content of the file.
        sort_keys: Whether keys are sorted, as in the configs that diffusers writes.

    Raises:
        ValueError: If a number is not finite, because JSON does not support such numbers.
    """
    with atomic_write(path) as partial:
        partial.write_text(
            json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n", encoding="utf-8"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """
    Yields a temporary path at which to create and fill a folder. After the context, the folder is flushed to the disk and renamed to
    `folder`.

    Raises:
        OSError: If a file cannot be written. The message names the folder or the file.
    """
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        with naming_write_errors(folder):
            yield partial
            flush_folder(partial)
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Returns the temporary path of a folder that is being written. All processes that write the folder use the same path."""
    return folder.with_name("partial-" + folder.name)


def final_name(folder: Path) -> str:
    """Returns the final name of a folder that may still have its temporary name."""
    return folder.resolve().name.removeprefix("partial-")


def flush_folder(folder: Path) -> None:
    """Flushes all files of a folder to the disk, because the disk may otherwise hold a file's name before its content."""
    for path in (*folder.rglob("*"), folder):
        _flush_path(path)


def replace_folder(partial: Path, folder: Path) -> None:
    """Replaces a folder by a complete and flushed folder. The old folder is removed last."""
    old = folder.with_name("old-" + folder.name)
    shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _flush_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Renames a folder, then removes it, so that an interruption leaves no incomplete folder under its name."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    os.replace(folder, partial)
    shutil.rmtree(partial)


def _flush_path(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
