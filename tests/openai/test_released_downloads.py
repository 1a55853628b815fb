"""Downloads of released checkpoints: broken, resumed and wrong ones, also by several processes and by killed processes."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_released import CHUNK_BYTES, UNET, Halting, add, check_refused, file_of, place_of, process_that_asks

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.hub import released_files, resumed_download
from diffusers_adm.openai.released import RELEASED_BY_NAME


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Makes chunks so small that a small file has many of them."""
    monkeypatch.setattr(resumed_download, "CHUNK_BYTES", CHUNK_BYTES)


def ask(cache: Path) -> Path:
    """Requests the converted folder, which is faster than loading it."""
    return released_files.converted_folder(RELEASED_BY_NAME["tiny"], ClassifierGuidedPipeline.from_openai, cache)


def part_of(server, cache: Path, content: bytes, version: str | None = None) -> Path:
    """Part of the file of `tiny` that an earlier download has left."""
    address = hashlib.sha256(f"{server.url}/unet.pt".encode()).hexdigest()[:8]
    part = place_of(cache).with_name(f"tiny.pt.{address}.part")
    part.write_bytes(content)
    if version is not None:
        resumed_download.version_file(part).write_text(version)
    return part


def version_of(content: bytes) -> str:
    """ETag of a file of the server."""
    return f'"{hashlib.sha256(content).hexdigest()}"'


def check_loaded(cache: Path) -> None:
    """Checks that the file of `tiny` is complete, and that nothing else is left of its download."""
    assert {path.name for path in place_of(cache).parent.iterdir()} == {"tiny.pt", "tiny.lock"}
    assert place_of(cache).read_bytes() == UNET


def test_download_goes_on_where_connections_were_cut(server, tmp_path):
    server.cut_after, server.cuts = len(UNET) // 4000 * 1000, 3
    ask(tmp_path)
    assert server.ranges == [None, *(f"bytes={number * server.cut_after}-" for number in (1, 2, 3))]
    check_loaded(tmp_path)


def test_connection_that_is_always_cut_ends_in_one_line_and_keeps_the_part(server, tmp_path):
    server.cut_after, server.cuts = CHUNK_BYTES // 2, 1000
    part = part_of(server, tmp_path, UNET[:3000], version_of(UNET))
    with pytest.raises(OSError, match="tiny cannot be downloaded from .* Try again, which resumes") as caught:
        ask(tmp_path)
    assert "\n" not in str(caught.value)
    assert part.read_bytes() == UNET[:3000]
    server.cuts = 0
    ask(tmp_path)
    check_loaded(tmp_path)


@pytest.mark.parametrize("version", [version_of(UNET), None], ids=["version", "no version"])
def test_next_call_resumes_what_a_call_has_left(version, server, tmp_path):
    part_of(server, tmp_path, UNET[: len(UNET) // 2], version)
    ask(tmp_path)
    assert server.ranges == [f"bytes={len(UNET) // 2}-"]
    check_loaded(tmp_path)


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_part_of_another_version_is_not_joined_with_the_rest_of_this_one(knows_if_range, server, tmp_path):
    server.knows_if_range = knows_if_range
    other = file_of("unet_class_conditional", **{"out.2.bias": torch.ones(6)})
    part_of(server, tmp_path, other[: len(other) // 2], version_of(other))
    ask(tmp_path)
    check_loaded(tmp_path)


def test_part_that_no_range_continues_begins_anew_and_its_version_is_kept(server, tmp_path):
    server.knows_ranges = False
    server.cut_after, server.cuts = 5000, 100
    with pytest.raises(OSError, match="cannot be downloaded"):
        ask(tmp_path)
    (version,) = (tmp_path / "files").rglob("*.version")
    assert version.read_text() == version_of(UNET)
    server.cuts = 0
    ask(tmp_path)
    check_loaded(tmp_path)


def test_complete_part_is_not_asked_for_again(server, tmp_path):
    part_of(server, tmp_path, UNET, version_of(UNET))
    ask(tmp_path)
    check_loaded(tmp_path)


@pytest.mark.parametrize(
    "page, kind",
    [
        (b"<!DOCTYPE html><html>Too many users have viewed or downloaded this file</html>", "a web page"),
        (b'{"error": "quota"}', "another kind of file"),
    ],
)
def test_answer_that_is_no_checkpoint_keeps_the_part(page, kind, server, tmp_path):
    server.page = page
    check_refused(
        f"tiny cannot be downloaded from {server.url}/unet.pt: the server returned {kind}", tmp_path, error=OSError
    )
    part = part_of(server, tmp_path, UNET[:5000], version_of(UNET))
    with pytest.raises(
        OSError, match=f"the server returned {kind}, not a checkpoint. Try again, .* or save the file yourself"
    ):
        ask(tmp_path)
    assert part.read_bytes() == UNET[:5000]
    server.page, server.ranges = None, []
    ask(tmp_path)
    assert server.ranges == ["bytes=5000-"]
    check_loaded(tmp_path)


def test_answer_without_an_end_is_cut_off(server, tmp_path, monkeypatch):
    server.says_length = False
    server.files["unet.pt"] = UNET + bytes(2**21)
    check_refused("unet.pt is not tiny: it has more than [0-9,]+ bytes", tmp_path)
    add("unknown", server, layout=None)
    monkeypatch.setattr(released_files, "MOST_BYTES", 2**20)
    check_refused("unet.pt is not unknown: it has more than 1,048,576 bytes", tmp_path, "unknown")


def test_file_that_is_not_there_and_a_server_that_is_not(server, tmp_path):
    add("gone", server, served="gone.pt")
    message = "gone cannot be downloaded from http://127.0.0.1.*404.*Try again.*save the file"
    check_refused(message, tmp_path, "gone", OSError)
    add("far", server, address="http://127.0.0.1:1/a.pt")
    check_refused("far cannot be downloaded from http://127.0.0.1:1/a.pt", tmp_path, "far", OSError)


def test_room_is_needed_for_what_is_left(server, tmp_path, monkeypatch):
    size, usage = RELEASED_BY_NAME["tiny"].size, shutil.disk_usage(tmp_path)
    part = part_of(server, tmp_path, UNET[: size // 2], version_of(UNET))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size * 3 // 2 - 1))
    with pytest.raises(OSError, match="The file of tiny and its conversion require .* GB in"):
        ask(tmp_path)
    assert part.is_file()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size * 3 // 2))
    ask(tmp_path)
    check_loaded(tmp_path)


# --- Processes ---


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_that_ask_at_once_download_once(server, tmp_path):
    processes = [process_that_asks(tmp_path) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(server.ranges) == 1
    check_loaded(tmp_path)


def test_process_killed_in_a_download_leaves_a_part_that_is_resumed(server, tmp_path):
    server.stall_after = CHUNK_BYTES * 10
    process = process_that_asks(tmp_path)
    wait_for(lambda: any(path.stat().st_size for path in (tmp_path / "files").rglob("*.part")))
    process.kill()
    process.join()
    (part,) = (tmp_path / "files").rglob("*.part")
    server.stall_after, had = None, part.stat().st_size
    ask(tmp_path)
    assert server.ranges == [None, f"bytes={had}-"]
    check_loaded(tmp_path)


def test_process_killed_in_a_conversion_leaves_no_folder(server, tmp_path):
    process = process_that_asks(tmp_path, Halting)
    wait_for(lambda: any((tmp_path / "converted").rglob("*.safetensors")))
    process.kill()
    process.join()
    (unfinished,) = (tmp_path / "converted" / "tiny").iterdir()
    assert unfinished.name.startswith("partial-")
    folder = ask(tmp_path)
    assert len(server.ranges) == 1
    assert list(unfinished.parent.iterdir()) == [folder]
