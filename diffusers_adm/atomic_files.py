"""Files and folders that are there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Turns all errors of writing a file or a folder into an `OSError` that names it: most errors of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # others have a message of their own
            error.filename = str(path)
        raise
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}") from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """
    Gives another name to write a file under. The file takes its place once all of it is on the disk.

    Raises:
        OSError: If the file cannot be written. The message names it.
    """
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        with naming_write_errors(path):
            yield partial
            _flush_path(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_can_write(path: Path) -> None:
    """
    Checks that a file can be written, before the work whose result it will hold.

    Raises:
        ValueError: If the path is that of a folder or a device, or its folder does not exist.
        OSError: If the folder does not take files.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'a device'}: give the name of a file to write.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.absolute().parent} to write {path.name} to.")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def write_json(path: Path, content: dict | list, sort_keys: bool = False) -> None:
    """
    Writes a JSON file. Configurations are sorted, as diffusers writes them.

    Raises:
        ValueError: If a number is not finite, because JSON has no such numbers.
    """
    with atomic_write(path) as partial:
        partial.write_text(
            json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n", encoding="utf-8"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """
    Gives another name to make and fill a folder under. The folder takes its place once all of it is on the disk.

    Raises:
        OSError: If a file cannot be written. The message names the folder or the file.
    """
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with naming_write_errors(folder):
            yield partial
            flush_folder(partial)
            replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Returns the name of a folder while it is written. Processes that write it together share the name."""
    return folder.with_name("partial-" + folder.name)


def final_name(folder: Path) -> str:
    """Returns the name of a folder once it is whole."""
    return folder.resolve().name.removeprefix("partial-")


def flush_folder(folder: Path) -> None:
    """Waits until all of a folder is on the disk: a name may reach it before what it names."""
    for path in (*folder.rglob("*"), folder):
        _flush_path(path)


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts a finished and flushed folder in the place of another, which is removed last."""
    old = folder.with_name("old-" + folder.name)
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed before it was removed
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    _flush_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder under another name: if it is killed on the way, no half of it remains under the name of the whole."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    os.replace(folder, partial)
    shutil.rmtree(partial)


def _flush_path(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
