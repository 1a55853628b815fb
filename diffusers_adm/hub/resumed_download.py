"""Download of a large file that goes on where an earlier one has stopped.

`http_get` of huggingface_hub does not serve: it shows no headers of the answer, so that the version of a file is unknown, and it
clears the part whenever a server answers without a range, even by an error page.
"""

import itertools
import time
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff, tqdm


CHUNK_BYTES = 2**20  # a broken connection costs at most so many
MOST_FAILURES = 5  # in a row, without another byte


def other_kind_of_file(beginning: bytes) -> str | None:
    """Returns a word for a file that `torch.save` cannot have written, as its first bytes tell. `None` for one that it can have."""
    if beginning.startswith((b"PK", b"\x80")):  # a zip file, or the pickle of torch before 1.6
        return None
    return "a web page" if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")) else "another kind of file"


def download_rest(address: str, part: Path, most_bytes: float, name: str) -> None:
    """
    Downloads a checkpoint, or the rest of it, and goes on after breaks as long as more arrives. The version that the server
    gives, an ETag or a date, is kept beside the part as `.version`. If the file has another version by now, the download begins
    anew.

    Args:
        address: Address of the file.
        part: File to write. An interrupted download leaves it, and a later one continues it.
        most_bytes: Largest size of the file.
        name: Name of the file, for the progress bar.

    Raises:
        ValueError: If the file is larger.
        OSError: If the server refuses, answers with anything but a checkpoint, or the part cannot be written.
    """
    failures = furthest = 0
    while True:
        try:
            return _receive(address, part, most_bytes, name)
        except (OSError, ValueError):
            raise
        except Exception:  # clients of several libraries are behind huggingface_hub, by its version
            size = _size(part)
            failures = 0 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures == MOST_FAILURES:
                raise
            time.sleep(1)


def version_file(part: Path) -> Path:
    """Returns the file that holds the version of a part."""
    return part.with_suffix(".version")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _receive(address: str, part: Path, most_bytes: float, name: str) -> None:
    had, headers = _size(part), {"Accept-Encoding": "identity"}
    known = version_file(part).read_text() if had and version_file(part).is_file() else ""
    if had:
        headers["Range"] = f"bytes={had}-"
    if known:
        headers["If-Range"] = known
    with http_stream_backoff(
        "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
    ) as answer:
        if had and answer.status_code == 416:
            return  # the file was complete already
        hf_raise_for_status(answer)
        version = answer.headers.get("ETag", "W/")
        if version.startswith("W/"):  # a weak one does not promise equal bytes
            version = answer.headers.get("Last-Modified", "")
        is_rest, chunks = answer.status_code == 206, answer.iter_bytes(CHUNK_BYTES)
        if is_rest and known and version not in ("", known):  # the server does not know If-Range
            part.unlink()
            return _receive(address, part, most_bytes, name)
        if not is_rest:
            first = next(chunks, b"")
            if (kind := other_kind_of_file(first)) is not None:
                raise OSError(f"the answer is {kind}, not a checkpoint")
            had, chunks = 0, itertools.chain([first], chunks)
        length = answer.headers.get("Content-Length")
        total = None if length is None else had + int(length)
        with (
            part.open("ab" if is_rest else "wb") as file,
            tqdm(total=total, initial=had, unit="B", unit_scale=True, desc=name) as progress,
        ):
            if not is_rest:  # after the old part is gone, so that a crash cannot leave it with the new version
                version_file(part).write_text(version)
            for chunk in chunks:
                if file.tell() + len(chunk) > most_bytes:
                    raise ValueError(
                        f"{address} is not {name.removesuffix('.pt')}: it has more than {most_bytes:,.0f} bytes."
                    )
                file.write(chunk)
                progress.update(len(chunk))
