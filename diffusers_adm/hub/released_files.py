"""Cache of released checkpoints: downloaded and checked files, and the folders of their conversion.

The cache is the folder `diffusers_adm` in the Hugging Face cache. `HF_HOME` moves it. `files/NAME.pt` is a downloaded file, or
`files/DIGEST/NAME.pt` for a registered checkpoint, and `converted/NAME/DIGEST` is a folder that `from_pretrained` loads.
"""

import dataclasses
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.utils import WeakFileLock

from diffusers_adm.atomic_files import atomic_folder, naming_write_errors, write_json
from diffusers_adm.hub.bundle import save_model
from diffusers_adm.hub.cards import released_card
from diffusers_adm.hub.resumed_download import download_rest, other_kind_of_file, version_file
from diffusers_adm.hub.saved_files import CARD_FILE
from diffusers_adm.openai.files import read_state_dict
from diffusers_adm.openai.released import TABLE_NAMES, check_layout
from diffusers_adm.openai.released_rows import ReleasedCheckpoint
from diffusers_adm.saved_folders import read_config


MIRROR_VARIABLE = "DIFFUSERS_ADM_MIRROR"
# Version of the conversion. Raise it when the conversion writes other folders than before.
CONVERSION = 2
# File in a converted folder with the SHA-256 of the checkpoint and a fingerprint of each file of the folder.
RECORD_FILE = "conversion.json"
# Largest download of a checkpoint of unknown size.
MOST_BYTES = 2**36


def converted_folder(
    released: ReleasedCheckpoint,
    convert: Callable[[Path], DiffusionPipeline | torch.nn.Module],
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    accept_license: bool = False,
) -> Path:
    """
    Returns the folder of a converted checkpoint. If it is missing in the cache or damaged, the checkpoint is downloaded, checked and
    converted. Folders of the same checkpoint from other versions of this package are removed.

    Args:
        released: Checkpoint.
        convert: Function that converts the file of the checkpoint to a pipeline or a model.
        cache_dir: Folder of the cache. `None` means the default cache, see the docstring of this module.
        local_files_only: Whether to use only files in the cache, without a download.
        accept_license: Whether the restrictions of the license are accepted.

    Raises:
        ValueError: If the checkpoint cannot be converted, its license is not accepted, or the file is not this checkpoint.
        OSError: If the checkpoint cannot be downloaded or written.
    """
    if released.unsupported is not None:
        raise ValueError(f"{released.name} cannot be converted, because {released.unsupported}.")
    cache = Path(constants.HF_HOME, "diffusers_adm") if cache_dir is None else Path(cache_dir)
    folder = cache / "converted" / released.name / _conversion_digest(released)
    file = cached_file(released, cache)
    if _is_whole(folder):
        return folder
    if not file.is_file():
        _check_may_download(released, cache, local_files_only, accept_license)
    with naming_write_errors(cache):
        for place in (folder.parent, file.parent):
            place.mkdir(parents=True, exist_ok=True)
    # One process downloads and converts, and the others wait.
    with WeakFileLock(file.with_suffix(".lock")):
        if not _is_whole(folder):
            _check_room(released, file)
            sha256 = check_file(file, released, str(file)) if file.is_file() else download_file(released, file)
            with atomic_folder(folder) as unfinished:
                save_converted(convert(file), unfinished)
                released_card(dataclasses.replace(released, sha256=sha256)).save(unfinished / CARD_FILE)
                write_json(unfinished / RECORD_FILE, {"sha256": sha256, "files": _fingerprints(unfinished)})
            for other in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _conversion_digest(released: ReleasedCheckpoint) -> str:
    """Returns a digest of everything that affects the weights and configs of a converted folder."""
    row = (released.kind, released.flags, released.imagenet_labels, released.guidance_scale)
    content = (CONVERSION, *row, released.timestep_respacing, released.layout, released.sha256)
    if released.name not in TABLE_NAMES:
        content += (released.address,)
    return _digest(content)


def cached_file(released: ReleasedCheckpoint, cache: Path) -> Path:
    """
    Returns the path of a checkpoint's file in the cache. That of a registered checkpoint depends on its address, because another one
    may be registered with the same name later.
    """
    folder = cache / "files"
    if released.name not in TABLE_NAMES:
        folder /= _digest(released.address)
    return folder / f"{released.name}.pt"


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]


def _fingerprints(folder: Path) -> dict[str, str]:
    """Returns the size and a digest of the beginning of each file. This is quick, and covers configs and headers of weights."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: _fingerprint(path) for name, path in files.items() if name != RECORD_FILE}


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{file.stat().st_size} {hashlib.sha256(stream.read(2**20)).hexdigest()}"


def _is_whole(folder: Path) -> bool:
    try:
        recorded = read_config(folder / RECORD_FILE).get("files")
        files = recorded.items() if isinstance(recorded, dict) else ()
        return bool(files) and all(_fingerprint(folder / name) == fingerprint for name, fingerprint in files)
    except OSError:
        return False


def save_converted(
    converted: DiffusionPipeline | torch.nn.Module, folder: str | os.PathLike, variant: str | None = None
) -> None:
    """Saves a pipeline or a model with the code of its classes."""
    if isinstance(converted, DiffusionPipeline):
        converted.save_pretrained(folder, variant=variant)
    else:
        save_model(converted, folder, variant=variant)


def _check_may_download(
    released: ReleasedCheckpoint, cache: Path, local_files_only: bool, accept_license: bool
) -> None:
    if local_files_only or is_offline_mode():
        raise OSError(
            f"{released.name} is not in the cache {cache}, and local_files_only or HF_HUB_OFFLINE disables downloads."
            " Download it once without them."
        )
    if released.terms is not None and not accept_license:
        raise ValueError(
            f"The license of {released.name}, {released.license}, allows {released.terms} use only (see"
            f" https://github.com/{released.code}). To accept the license, pass accept_license=True, or run `diffusers-adm convert"
            f" --released {released.name} --accept_license --output DIR` once."
        )


def _check_room(released: ReleasedCheckpoint, file: Path) -> None:
    part = _part_of(released, file)
    there = file if file.is_file() else part if part.is_file() else None
    missing = max(0, (released.size or 0) - (there.stat().st_size if there else 0))
    needed, free = missing + (released.size or 0), shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            f"The file of {released.name} and its conversion require {needed / 1e9:.1f} GB in {file.parent.parent}, but only"
            f" {free / 1e9:.1f} GB are free. Choose another folder by cache_dir or HF_HOME."
        )


def address_of(released: ReleasedCheckpoint) -> str:
    """Returns the address from which a checkpoint is downloaded. An environment variable can name a mirror."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{released.file}" if mirror else released.url


def _part_of(released: ReleasedCheckpoint, file: Path) -> Path:
    # The name depends on the address, so that parts from two sources are never mixed.
    return file.with_name(f"{file.name}.{hashlib.sha256(address_of(released).encode()).hexdigest()[:8]}.part")


def download_file(released: ReleasedCheckpoint, file: Path) -> str:
    """
    Downloads a checkpoint under a temporary name, checks it, and renames it. An interrupted download is resumed.

    Args:
        released: Checkpoint.
        file: File to write.

    Returns:
        SHA-256 of the file.

    Raises:
        ValueError: If the downloaded file is not this checkpoint.
        OSError: If the file cannot be downloaded or written.
    """
    address, part = address_of(released), _part_of(released, file)
    try:
        download_rest(
            address,
            part,
            most_bytes=MOST_BYTES if released.size is None else 1.1 * released.size + 2**20,
            name=file.name,
        )
        sha256 = check_file(part, released, address)
    except ValueError:
        _remove(part)
        raise
    except Exception as error:  # errors of the clients behind huggingface_hub have no class in common
        if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
            _remove(part)
            raise OSError(error.errno, error.strerror, str(file)) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OSError(
            f"{released.name} cannot be downloaded from {address}: {reason}. Try again, which resumes the download, or save"
            f" the file yourself as {file}."
        ) from error
    os.replace(part, file)
    version_file(part).unlink(missing_ok=True)
    return sha256


def _remove(part: Path) -> None:
    for path in (part, version_file(part)):
        path.unlink(missing_ok=True)


def check_file(file: Path, released: ReleasedCheckpoint, source: str) -> str:
    """
    Checks that a file is a released checkpoint, by its SHA-256 and by the names and shapes of its tensors.

    Args:
        file: File to check.
        released: Expected checkpoint.
        source: Path or address of the file, for error messages.

    Returns:
        SHA-256 of the file.

    Raises:
        ValueError: If the file is not this checkpoint, is damaged, or holds code.
    """
    with file.open("rb") as stream:
        kind = other_kind_of_file(stream.read(100))
        if kind is not None:
            raise ValueError(
                f"{source} is {kind}, not a checkpoint: download the file in a browser, and save it there."
            )
        stream.seek(0)
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if released.sha256 not in (None, sha256):
        raise ValueError(f"{source} is not {released.name}: its SHA-256 is {sha256} instead of {released.sha256}.")
    try:
        # torch does not compare the checksums of the parts when it maps a file into memory.
        is_unknown_zip = released.sha256 is None and zipfile.is_zipfile(file)
        if is_unknown_zip and (damaged := zipfile.ZipFile(file).testzip()) is not None:
            raise ValueError(f"{damaged} has another checksum.")
        tensors = read_state_dict(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{source} must be a checkpoint of tensors by name, but is damaged or incomplete, or holds code or objects, which"
            " are never loaded."
        ) from error
    check_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()}, released, source)
    return sha256
