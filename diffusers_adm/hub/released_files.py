"""Cache of the released checkpoints: files that were downloaded and checked, and the folders that they were converted to.

The cache is the folder `diffusers_adm` of the Hugging Face cache, which `HF_HOME` moves. `files/NAME.pt` is a downloaded
file, and `converted/NAME-DIGEST` what `from_pretrained` loads.
"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock

from diffusers_adm.atomic_files import atomic_folder, naming_write_errors
from diffusers_adm.hub.bundle import save_model
from diffusers_adm.hub.cards import released_card
from diffusers_adm.hub.saved_files import CARD_FILE
from diffusers_adm.openai.files import read_state_dict
from diffusers_adm.openai.released import RELEASED_BY_NAME
from diffusers_adm.openai.released_rows import ReleasedCheckpoint, tensor_layout


MIRROR_VARIABLE = "DIFFUSERS_ADM_MIRROR"
# Raised whenever a conversion gives another folder than before.
CONVERSION = 1


def converted_folder(
    released: ReleasedCheckpoint,
    convert: Callable[[Path], DiffusionPipeline | torch.nn.Module],
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    accept_license: bool = False,
) -> Path:
    """
    Returns the folder of a converted checkpoint. It is downloaded, checked and converted if it is not in the cache.

    Args:
        released: Checkpoint.
        convert: Function that makes a pipeline or a model of its file.
        cache_dir: Folder of the cache. `None` means that of all checkpoints, see above.
        local_files_only: Whether nothing must be downloaded.
        accept_license: Whether the restrictions of the license are accepted.

    Raises:
        ValueError: If the checkpoint cannot be converted, its license is not accepted, or the file is another one.
        OSError: If it cannot be downloaded or written.
    """
    if released.unsupported is not None:
        raise ValueError(f"{released.name} cannot be converted, because {released.unsupported}.")
    cache = Path(constants.HF_HOME, "diffusers_adm") if cache_dir is None else Path(cache_dir)
    digest = hashlib.sha256(f"{CONVERSION} {released!r}".encode()).hexdigest()[:8]
    folder = cache / "converted" / f"{released.name}-{digest}"
    file = cache / "files" / f"{released.name}.pt"
    if folder.is_dir():
        return folder
    if not file.is_file():
        _check_may_download(released, cache, local_files_only, accept_license)
    with naming_write_errors(cache):
        for place in (folder.parent, file.parent):
            place.mkdir(parents=True, exist_ok=True)
    # One process downloads and converts, and the others wait.
    with WeakFileLock(file.with_suffix(".lock")):
        if not folder.is_dir():
            if file.is_file():
                check_file(file, released, str(file))
            else:
                download_file(released, file)
            with atomic_folder(folder) as unfinished:
                save_converted(convert(file), unfinished)
                released_card(released).save(unfinished / CARD_FILE)
    return folder


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
            f"{released.name} is not in the cache {cache}, and local_files_only or HF_HUB_OFFLINE forbids to download it."
        )
    if released.terms is not None and not accept_license:
        raise ValueError(
            f"{released.name} is for {released.terms} use, by its license {released.license}: accept it by accept_license=True, or"
            f" once by `diffusers-adm convert --released {released.name} --accept_license --output DIR`."
        )
    existing = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    needed, free = 2 * (released.size or 0), shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"{released.name} needs {needed / 1e9:.1f} GB in {cache}, for the file and its conversion, but {free / 1e9:.1f} GB"
            " are free: choose another folder by cache_dir or HF_HOME."
        )


def address_of(released: ReleasedCheckpoint) -> str:
    """Returns the address to download a checkpoint from: its own, or that of the mirror which the environment names."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{released.file}" if mirror else released.url


def download_file(released: ReleasedCheckpoint, file: Path) -> None:
    """
    Downloads a checkpoint, and checks it before it takes its place. A download that was interrupted is resumed.

    Args:
        released: Checkpoint.
        file: File to write.

    Raises:
        ValueError: If the downloaded file is another one.
        OSError: If it cannot be downloaded or written.
    """
    address = address_of(released)
    # Named by the address, so that parts of two sources are never mixed.
    partial = file.with_name(f"{file.name}.{hashlib.sha256(address.encode()).hexdigest()[:8]}.part")
    try:
        _receive(address, partial, file.name)
    # Clients of several libraries are behind huggingface_hub, by its version, and their errors have no class in common.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(file)) from error
        if not os.path.getsize(partial):
            partial.unlink()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OSError(
            f"{released.name} cannot be downloaded from {address}: {reason}. Try again, which resumes the download, or save"
            f" the file yourself as {file}."
        ) from error
    try:
        check_file(partial, released, address)
    except ValueError:
        partial.unlink()
        raise
    os.replace(partial, file)


def _receive(address: str, partial: Path, name: str) -> None:
    """Downloads a file, or the rest of it, and goes on after breaks as long as something arrives."""
    while True:
        with partial.open("ab") as file:
            before = file.tell()
            try:
                http_get(
                    address,
                    file,
                    resume_size=before,
                    headers={"Accept-Encoding": "identity"},
                    displayed_filename=name,
                )
                return
            except Exception as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code == 416:
                    return  # the file was complete already
                file.flush()
                disk_failed = isinstance(error, OSError) and error.errno is not None
                if disk_failed or os.path.getsize(partial) <= before:
                    raise


def check_file(file: Path, released: ReleasedCheckpoint, source: str) -> None:
    """
    Checks that a file is a certain released checkpoint, by its SHA-256 and by the names and shapes of its tensors.

    Args:
        file: File to check.
        released: Checkpoint that it should be.
        source: Path or address of the file, for the message.

    Raises:
        ValueError: If it is another file, damaged, or holds code.
    """
    with file.open("rb") as stream:
        if stream.read(100).lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise ValueError(
                f"{source} is a web page, not a checkpoint: download the file in a browser, and save it as {released.name}.pt,"
                " which `diffusers-adm convert` and `from_openai` recognise."
            )
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if released.sha256 not in (None, digest):
        raise ValueError(f"{source} is not {released.name}: its SHA-256 is {digest} instead of {released.sha256}.")
    try:
        # torch does not compare the checksums of the parts when it maps a file into memory.
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()) is not None:
            raise ValueError(f"{damaged} has another checksum.")
        tensors = read_state_dict(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{source} is no checkpoint of tensors by name: it is damaged or incomplete, or holds code or objects, which are"
            " not loaded."
        ) from error
    _check_layout(tensors, released, source)


def _check_layout(tensors: Mapping[str, torch.Tensor], released: ReleasedCheckpoint, source: str) -> None:
    layout = tensor_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if released.layout not in (None, layout):
        like = [other.name for other in RELEASED_BY_NAME.values() if other.layout == layout]
        holds = (
            f"the tensors of {' or '.join(like[:3])}" if like else f"{layout.parameters:,} parameters of other tensors"
        )
        raise ValueError(
            f"{source} is not {released.name}, which has {released.layout.parameters:,} parameters: it holds {holds}."
        )
