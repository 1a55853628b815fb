"""Download of a large file that resumes an interrupted download.

`http_get` of huggingface_hub is not used, for two reasons. It does not return the headers of the response, so that the version of the file
is unknown. It also deletes the partial file if the response is no range of the file, even if the response is an error page.
"""

import itertools
import time
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff, tqdm


CHUNK_BYTES = 2**20  # most bytes that a broken connection loses
MOST_FAILURES = 5  # in a row, without progress


def other_kind_of_file(beginning: bytes) -> str | None:
    """Returns what a file is if it is no checkpoint, judged by its first bytes. `None` if `torch.save` may have written it."""
    if beginning.startswith((b"PK", b"\x80")):  # a zip file, or the pickle of torch before 1.6
        return None
    return "a web page" if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")) else "another kind of file"


def download_rest(address: str, part: Path, most_bytes: float, name: str) -> None:
    """
    Downloads a checkpoint, or the rest of it. Broken connections are resumed as long as they make progress. The version that the
    server states, an ETag or a date, is kept in a `.version` file beside the part. If the server has another version by then, the
    download starts again.

    Args:
        address: Address of the file.
        part: File to write. An interrupted download leaves it, and the next download continues it.
        most_bytes: Largest size of the file.
        name: Name of the file, for the progress bar.

    Raises:
        ValueError: If the file is larger than `most_bytes`.
        OSError: If the server refuses the request or returns no checkpoint, or the part cannot be written.
    """
    failures = furthest = 0
    while True:
        try:
            return _receive(address, part, most_bytes, name)
        except (OSError, ValueError):
            raise
        except Exception:  # depending on its version, huggingface_hub uses the client of another library
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
        if version.startswith("W/"):  # a weak ETag does not promise equal bytes
            version = answer.headers.get("Last-Modified", "")
        is_rest, chunks = answer.status_code == 206, answer.iter_bytes(CHUNK_BYTES)
        if is_rest and known and version not in ("", known):  # the server does not know If-Range
            part.unlink()
            return _receive(address, part, most_bytes, name)
        if not is_rest:
            first = next(chunks, b"")
            if (kind := other_kind_of_file(first)) is not None:
                raise OSError(f"the server returned {kind}, not a checkpoint")
            had, chunks = 0, itertools.chain([first], chunks)
        length = answer.headers.get("Content-Length")
        total = None if length is None else had + int(length)
        with (
            part.open("ab" if is_rest else "wb") as file,
            tqdm(total=total, initial=had, unit="B", unit_scale=True, desc=name) as progress,
        ):
            if (
                not is_rest
            ):  # written after the old part is deleted, so that a crash cannot leave the old part with the new version
                version_file(part).write_text(version)
            for chunk in chunks:
                if file.tell() + len(chunk) > most_bytes:
                    raise ValueError(
                        f"{address} is not {name.removesuffix('.pt')}: it has more than {most_bytes:,.0f} bytes."
                    )
                file.write(chunk)
                progress.update(len(chunk))
