"""Files and folders are written completely, or not at all."""

import json
import os
import subprocess
import sys

import pytest

from diffusers_adm.atomic_files import atomic_folder, atomic_write, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_keeps_its_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"b": 1, "a": 2}, sort_keys=True)
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(json.loads(path.read_text())) == ["a", "b"] and names(tmp_path) == ["file.json"]


def test_file_of_a_killed_process_is_removed_by_the_next(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from diffusers_adm.atomic_files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("picture.png", "other.png"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name])
    left = names(tmp_path)
    assert len(left) == 2 and all(name.startswith("partial-") for name in left)
    with atomic_write(tmp_path / "picture.png") as partial:
        partial.write_text("whole")
    (other,) = [name for name in left if name.endswith("-other.png")]
    assert names(tmp_path) == sorted([other, "picture.png"])


def test_file_of_a_running_process_stays(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as partial:
        partial.write_text("whole")
        other = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
        other.write_text("of another")
        elsewhere = tmp_path / "partial-another-machine-999999999-file"
        elsewhere.write_text("of another machine")
    with atomic_write(path) as partial:
        partial.write_text("whole")
    assert names(tmp_path) == sorted([path.name, other.name, elsewhere.name])


def test_folder_is_replaced_once_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "partial-model" / "of-a-killed-run").mkdir(parents=True)
    for text in ("first", "second"):
        with atomic_folder(folder) as partial:
            (partial / "inner").mkdir(parents=True)
            (partial / "inner" / "file").write_text(text)
            assert text == "first" or (folder / "inner" / "file").read_text() == "first"
    with pytest.raises(RuntimeError), atomic_folder(folder) as partial:
        partial.mkdir()
        raise RuntimeError
    assert (folder / "inner" / "file").read_text() == "second" and names(tmp_path) == ["model"]


def test_error_with_a_message_of_its_own_keeps_it(tmp_path):
    with pytest.raises(OSError, match="^no network$"), atomic_folder(tmp_path / "model"):
        raise OSError("no network")


def test_numbers_that_json_lacks_are_refused(tmp_path):
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "file.json", {"metric": number})
    assert names(tmp_path) == []
