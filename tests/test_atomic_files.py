"""Files and folders that are there whole or not at all."""

import json

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
