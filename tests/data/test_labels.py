"""Labels of users, and the classes that are made from them."""

import pytest
from data_options import arguments, load_images, parquet, picture
from datasets import ClassLabel, Dataset, Features, Image, Value

from diffusers_adm.data.datasets import required_class_names


def test_folders_are_classes(folder):
    images, held_out = load_images(arguments("--train_data_dir", str(folder)))
    assert required_class_names(images) == ["cat", "dog"] and held_out is None
    assert [images[i]["label"] for i in range(8)] == [0] * 6 + [1] * 2
    assert images[0]["image"].shape == (3, 16, 16)


def test_class_is_the_prefix_of_the_file_name(tmp_path):
    for i, name in enumerate(("zebra_1", "ant_7", "zebra_2_x")):
        picture(i).save(tmp_path / f"{name}.png")
    options = ["--train_data_dir", str(tmp_path), "--label_from", "filename_prefix"]
    images, _ = load_images(arguments(*options))
    labels = {images.class_names[images[i]["label"]] for i in range(3)}
    assert required_class_names(images) == ["ant", "zebra"] and labels == {"ant", "zebra"}
    picture(9).save(tmp_path / "bee.png")
    with pytest.raises(ValueError, match=r"bee\.png"):
        load_images(arguments(*options))


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_names_and_numbers_become_classes(tmp_path, kind):
    pictures = [picture(i) for i in range(3)]
    names, numbers = tmp_path / "names", tmp_path / "numbers"
    names.mkdir(), numbers.mkdir()
    parquet(names, {"image": Image(), "kind": Value(kind)}, image=pictures, kind=["b", "a", "b"])
    images, _ = load_images(arguments("--dataset_name", str(names), "--label_column", "kind"))
    assert required_class_names(images) == ["a", "b"] and images[1]["label"] == 0
    parquet(numbers, {"image": Image(), "kind": Value("int64")}, image=pictures, kind=[10, 0, 2])
    images, _ = load_images(arguments("--dataset_name", str(numbers), "--label_column", "kind"))
    assert required_class_names(images) == [str(i) for i in range(11)] and images[0]["label"] == 10


def test_missing_labels_and_single_classes_are_refused(tmp_path):
    pictures = [picture(i) for i in range(2)]
    features = {"image": Image(), "label": ClassLabel(names=["only"])}
    images, _ = load_images(arguments("--dataset_name", parquet(tmp_path, features, image=pictures, label=[0, 0])))
    with pytest.raises(ValueError, match="at least 2 classes"):
        required_class_names(images)
    parquet(tmp_path, features, image=pictures, label=[0, -1])
    with pytest.raises(ValueError, match="must have a label"):
        load_images(arguments("--dataset_name", str(tmp_path)))
    parquet(tmp_path, {"image": Image()}, image=pictures)
    images, _ = load_images(arguments("--dataset_name", str(tmp_path)))
    with pytest.raises(ValueError, match="--label_column"):
        required_class_names(images)


def test_held_out_split_has_the_classes_of_the_training_split(tmp_path):
    features = Features({"image": Image(), "kind": Value("string")})
    for split, names in (("train", ["a", "b", "c"]), ("fewer", ["c", "a"]), ("other", ["a", "d"])):
        rows = Dataset.from_dict({"image": [picture(0)] * len(names), "kind": names}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "fewer", "other")}

    def load(split):
        args = arguments("--dataset_name", "parquet", "--label_column", "kind", "--validation_split", "test")
        args.data_files = {"train": files["train"], "test": files[split]}
        return load_images(args)[1]

    held_out = load("fewer")
    assert held_out.class_names == ["a", "b", "c"] and [held_out[i]["label"] for i in range(2)] == [2, 0]
    with pytest.raises(ValueError, match="held-out split must have the classes of the training split, but has .*'d'"):
        load("other")


def test_labels_that_are_not_used_need_not_be_right(tmp_path):
    features = {"image": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c"])}
    source = parquet(tmp_path, features, image=[picture(0)] * 2, fine=[-1, -1], coarse=[0, 0])
    images, _ = load_images(arguments("--dataset_name", source), labelled=False)
    assert images.class_names is None and set(images[0]) == {"image"}


@pytest.mark.parametrize(("labels", "count"), [([1, 3, 3], 2), ([2, 1, 0], 0)])
def test_numbers_without_images_are_named(labels, count, tmp_path, caplog):
    features = Features({"image": Image(), "kind": Value("int64")})
    for split, kinds in (("train", labels), ("test", labels[:1])):
        rows = Dataset.from_dict({"image": [picture(i) for i in range(len(kinds))], "kind": kinds}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    # A held-out split may lack classes.
    load_images(arguments("--dataset_name", str(tmp_path), "--label_column", "kind", "--validation_split", "test"))
    assert caplog.text.count("has no images of 2 of them, such as 0") == (count > 0) == bool(caplog.text)


def test_columns_that_hold_no_labels_are_refused(tmp_path):
    features = {"image": Image(), "kind": [Value("int64")]}
    folder = parquet(tmp_path, features, image=[picture(0)] * 2, kind=[[0], [1, 2]])
    with pytest.raises(ValueError, match="Labels must be names or class numbers, but column 'kind' holds List"):
        load_images(arguments("--dataset_name", folder, "--label_column", "kind"))
