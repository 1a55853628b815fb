"""Folders of images: the images that are read, for all kinds of file names."""

from pathlib import Path

import numpy as np
import pytest
from data_options import arguments, load_images, parquet, picture
from datasets import Image
from PIL import Image as PILImage

from diffusers_adm.data.folders import find_layout
from diffusers_adm.data.image_sets import open_images


def save(folder, *names):
    """Saves a picture under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(folder / name)
    return str(folder)


PLAIN = ["cat/0.png", "cat/1.png", "dog/0.png"]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/train_station.png", "dog/train.png"], ["cat", "dog"]),
        (["cat/test_0.png", "dog/validation.png"], ["cat", "dog"]),
        (["train/0.png", "train/1.png"], ["cat", "dog", "train"]),
        (["test/train.png", "val tube/0.png"], ["cat", "dog", "test", "val tube"]),
    ],
)
@pytest.mark.parametrize("option", ["--train_data_dir", "--dataset_name"])
def test_every_image_of_every_class_is_read(tmp_path, names, classes, option):
    folder = save(tmp_path, *PLAIN, *names)
    images, _ = load_images(arguments(option, folder))
    assert len(images) == len(PLAIN) + len(names) and images.class_names == classes
    if option == "--dataset_name":
        assert open_images(folder, labelled=True).num_images == len(images)


@pytest.mark.parametrize("validation", ["validation", "val", "Valid_images"])
def test_split_folders_are_splits_and_the_log_says_so(tmp_path, caplog, validation):
    names = [f"train/{name}" for name in PLAIN] + [f"{validation}/{name}" for name in ("cat/train.png", "dog/0.png")]
    folder = save(tmp_path, *names)
    images, held_out = load_images(arguments("--train_data_dir", folder, "--validation_split", "validation"))
    assert (len(images), len(held_out)) == (3, 2) and held_out.class_names == ["cat", "dog"]
    assert "Split train is used" in caplog.text and "Split validation is used" in caplog.text


def test_names_of_folders_may_have_brackets(tmp_path):
    folder = save(tmp_path / "mine [v1]", *(f"{split} [v1]/{name}" for split in ("train", "test") for name in PLAIN))
    images, held_out = load_images(arguments("--train_data_dir", folder, "--validation_split", "test"))
    assert len(images) == len(held_out) == len(PLAIN) and images.class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["dataset.zip", "dog/rows.parquet", "test/more.tar.gz"])
def test_datasets_of_other_formats_beside_images_are_refused(tmp_path, name):
    """Tests that the images are not left out, and that nothing is added to them."""
    folder = save(tmp_path, *PLAIN, "test/0.png")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"must hold only images, but also holds {name}"):
        load_images(arguments("--train_data_dir", folder))


def test_split_folders_without_classes_have_no_labels(tmp_path):
    folder = save(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    images, _ = load_images(arguments("--train_data_dir", folder))
    assert len(images) == 2 and images.class_names is None


def test_split_folders_beside_other_images_are_refused(tmp_path):
    folder = save(tmp_path, "train/cat/0.png", "extra/0.png")
    with pytest.raises(ValueError, match=r"split folders, \['train'\], and other images, \['extra'\]"):
        load_images(arguments("--train_data_dir", folder))


def test_difference_from_the_files_on_disk_is_refused(tmp_path):
    layout = find_layout(save(tmp_path, *PLAIN))
    layout.check_number(3)
    with pytest.raises(ValueError, match="has 3 image files, but 2 were loaded"):
        layout.check_number(2)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["loaded", "streamed"])
@pytest.mark.parametrize("names", [PLAIN, [f"train/{name}" for name in PLAIN]], ids=["classes", "splits"])
def test_linked_folders_are_read(tmp_path, names, streaming):
    folder = Path(save(tmp_path / "images", *names))
    save(tmp_path, "elsewhere/0.png")
    classes = folder / Path(names[0]).parent.parent
    (classes / "ant").symlink_to(tmp_path / "elsewhere")
    (classes / "cat" / "back").symlink_to(classes)  # a link to a folder above would be read for ever
    (tmp_path / "elsewhere" / "deeper").symlink_to(tmp_path / "elsewhere")
    images, _ = load_images(arguments("--train_data_dir", str(folder), *streaming))
    assert sorted(item["label"] for item in images.examples(9)) == [0, 1, 1, 2] and images.class_names == [
        "ant",
        "cat",
        "dog",
    ]


@pytest.mark.parametrize("others", [[], PLAIN], ids=["alone", "beside others"])
def test_images_that_would_be_left_out_are_refused(others, tmp_path):
    folder = save(tmp_path, *others)
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match="has 1 images of formats that `datasets` does not read, such as ant/0.HEIC"):
        load_images(arguments("--train_data_dir", folder))


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_fingerprint_does_not_depend_on_the_spelling_of_the_path(kind, tmp_path, monkeypatch):
    save(tmp_path / "images", *PLAIN)
    (tmp_path / "parquet").mkdir()
    parquet(tmp_path / "parquet", {"image": Image()}, image=[picture(0)])
    monkeypatch.chdir(tmp_path)
    fingerprints = {open_images(path).fingerprint for path in (kind, f"./{kind}/", str(tmp_path / kind))}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("numbers", "batch_size", "greys"),
    [(range(5), 2, [[0, 10], [20, 30], [40]]), ([1, 4], 1, [[10], [40]]), ([], 2, [])],
)
def test_images_are_read_in_batches_and_in_order(numbers, batch_size, greys, tmp_path):
    for number in range(5):
        PILImage.new("L", (4, 4), 10 * number).save(tmp_path / f"{number}.png")
    batches = open_images(tmp_path).chosen(np.array(numbers, dtype=int), batch_size)
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == greys


def test_a_format_is_not_taken_for_a_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "parquet").mkdir()
    parquet(tmp_path, {"image": Image()}, image=[picture(0)])
    monkeypatch.chdir(tmp_path)
    args = arguments("--dataset_name", "parquet", "--data_files", "train.parquet")
    assert len(load_images(args)[0]) == 1
