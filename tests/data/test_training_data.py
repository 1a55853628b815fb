"""What users have for images and labels, and what training makes of it."""

import argparse
import itertools
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from diffusers_adm.cli import main
from diffusers_adm.data.datasets import required_class_names
from diffusers_adm.data.image_modes import to_mode
from diffusers_adm.training.arguments import add_data_arguments
from diffusers_adm.training.arguments import load_images_of as load_images
from diffusers_adm.training.train_upsampler import shrink


def arguments(*options):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args([*options, "--resolution", "16"])
    args.seed = 0
    return args


def picture(seed, size=(20, 24)):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two subfolders, "cat" of six images and "dog" of two."""
    for name, count in (("cat", 6), ("dog", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def parquet(folder, features, **columns):
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / "train.parquet")
    return str(folder)


def test_folders_are_classes(folder):
    images, held_out = load_images(arguments("--train_data_dir", str(folder)))
    assert required_class_names(images) == ["cat", "dog"] and held_out is None
    assert [images[i]["label"] for i in range(8)] == [0] * 6 + [1] * 2
    assert images[0]["image"].shape == (3, 16, 16)


def test_held_out_fraction_is_of_each_class(folder):
    images, held_out = load_images(arguments("--train_data_dir", str(folder), "--validation_fraction", "0.5"))
    for part in (images, held_out):
        assert sorted(part[i]["label"] for i in range(len(part))) == [0, 0, 0, 1]
    everything, _ = load_images(arguments("--train_data_dir", str(folder), "--no-random_flip"))
    assert len(everything) == 8


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


def test_names_and_numbers_become_classes(tmp_path):
    pictures = [picture(i) for i in range(3)]
    names, numbers = tmp_path / "names", tmp_path / "numbers"
    names.mkdir(), numbers.mkdir()
    parquet(names, {"image": Image(), "kind": Value("string")}, image=pictures, kind=["b", "a", "b"])
    images, _ = load_images(arguments("--dataset_name", str(names), "--label_column", "kind"))
    assert required_class_names(images) == ["a", "b"] and images[1]["label"] == 0
    parquet(numbers, {"image": Image(), "kind": Value("int64")}, image=pictures, kind=[10, 0, 2])
    images, _ = load_images(arguments("--dataset_name", str(numbers), "--label_column", "kind"))
    assert required_class_names(images) == [str(i) for i in range(11)] and images[0]["label"] == 10


def test_missing_labels_and_single_classes_are_refused(tmp_path):
    pictures = [picture(i) for i in range(2)]
    features = {"image": Image(), "label": ClassLabel(names=["only"])}
    images, _ = load_images(arguments("--dataset_name", parquet(tmp_path, features, image=pictures, label=[0, 0])))
    with pytest.raises(ValueError, match="only"):
        required_class_names(images)
    parquet(tmp_path, features, image=pictures, label=[0, -1])
    with pytest.raises(ValueError, match="no label"):
        load_images(arguments("--dataset_name", str(tmp_path)))
    parquet(tmp_path, {"image": Image()}, image=pictures)
    images, _ = load_images(arguments("--dataset_name", str(tmp_path)))
    with pytest.raises(ValueError, match="--label_column"):
        required_class_names(images)


def test_unreadable_image_stops_the_run_or_is_skipped_with_its_name(folder, caplog):
    broken = folder / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:150])
    images, _ = load_images(arguments("--train_data_dir", str(folder)))
    with pytest.raises(ValueError, match=r"3\.png.*--on_unreadable skip"):
        images[3]
    images, _ = load_images(arguments("--train_data_dir", str(folder), "--on_unreadable", "skip", "--no-random_flip"))
    assert torch.equal(images[3]["image"], images[4]["image"])
    assert "3.png" in caplog.text
    caplog.clear()
    images[3]
    assert not caplog.text  # once is enough


def test_inspection_tells_what_training_would_see(folder, capsys):
    (folder / "dog" / "1.png").write_bytes(b"no image")
    picture(0, (10, 30)).convert("L").save(folder / "cat" / "0.png")
    assert main(["inspect-data", "--train_data_dir", str(folder), "--resolution", "16"]) == 0
    out = capsys.readouterr().out
    assert "8 images" in out and "2 classes" in out
    assert re.search(r"6 +0 cat", out) and re.search(r"2 +1 dog", out)
    assert "24x20 (6), 30x10 (1)" in out and "RGB (6), L (1)" in out
    assert "1 smaller than 16 pixels" in out
    assert re.search(r"1 unreadable\n.*1\.png: cannot identify", out)
    assert main(["inspect-data", "--train_data_dir", str(folder), "--label_column", "colour"]) == 2


def test_what_is_random_depends_on_seed_epoch_and_index_alone(folder):
    options = ["--train_data_dir", str(folder), "--crop", "random"]
    images, _ = load_images(arguments(*options))
    first = [images[i]["image"] for i in range(8)]
    assert all(torch.equal(images[i]["image"], first[i]) for i in reversed(range(8)))
    images.set_epoch(1)
    assert not all(torch.equal(images[i]["image"], first[i]) for i in range(8))
    args = arguments(*options)
    args.seed = 1
    other, _ = load_images(args)
    assert not all(torch.equal(other[i]["image"], first[i]) for i in range(8))


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
def test_small_images_are_those_that_an_upsampler_is_given(folder, crop):
    options = ["--train_data_dir", str(folder), "--crop", crop]
    large, small = arguments(*options), arguments(*options, "--source_resolution", "32")
    large.resolution = 32
    (large, _), (small, _) = load_images(large), load_images(small)
    for whole, shrunk in zip(large, small):
        expected = shrink(whole["image"][None], 16)[0]
        assert shrunk["image"].shape == (3, 16, 16)
        assert (shrunk["image"] - expected).abs().max() < 1.01 / 255  # half a step of 8 bits
    for size in (8, 16, 24):
        with pytest.raises(ValueError, match=f"--source_resolution {size} is not a multiple of --resolution 16"):
            load_images(arguments(*options, "--source_resolution", str(size)))


def test_all_modes_become_eight_bit_grey_or_colour(tmp_path):
    grey = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    image = PILImage.fromarray(grey)
    deep = PILImage.fromarray(grey.astype(np.uint16) * 257)
    for made in (image, deep, image.convert("RGB"), image.convert("P"), image.convert("LA")):
        assert np.array_equal(np.asarray(to_mode(made, 1)), grey)
        assert np.array_equal(np.asarray(to_mode(made, 3))[..., 2], grey)
    assert to_mode(image.convert("CMYK"), 3).mode == "RGB"
    transparent = PILImage.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(to_mode(transparent, 3)).min() == 255

    (tmp_path / "a").mkdir()
    turned = PILImage.new("RGB", (32, 16), "black")
    turned.paste("white", (0, 0, 16, 16))
    exif = PILImage.Exif()
    exif[PILImage.ExifTags.Base.Orientation] = 6  # to be turned clockwise: left becomes top
    turned.save(tmp_path / "a" / "turned.png", exif=exif)
    args = arguments("--train_data_dir", str(tmp_path), "--no-random_flip")
    args.resolution = 8
    images, _ = load_images(args)
    # 16 wide and 32 high after turning: the central square shows white above, black below.
    assert images[0]["image"][:, 0].min() > 0.9 and images[0]["image"][:, -1].max() < -0.9


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
    with pytest.raises(ValueError, match="'d'.*held-out"):
        load("other")


def test_missing_image_and_image_that_does_not_fit_are_named(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    pictures = [picture(0), None, picture(1)]
    source = ["--dataset_name", parquet(tmp_path, features, image=pictures, label=[0, 1, 1])]
    images, _ = load_images(arguments(*source))
    with pytest.raises(ValueError, match="number 1 cannot be read"):
        images[1]
    images, _ = load_images(arguments(*source, "--on_unreadable", "skip"))
    assert images[1]["label"] == 1
    images, _ = load_images(arguments(*source, "--crop", "pad"))
    with pytest.raises(ValueError, match="number 2: .*does not fit"):
        images[2]


def test_labels_that_are_not_used_need_not_be_right(tmp_path):
    features = {"image": Image(), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c"])}
    source = parquet(tmp_path, features, image=[picture(0)] * 2, fine=[-1, -1], coarse=[0, 0])
    images, _ = load_images(arguments("--dataset_name", source), labelled=False)
    assert images.class_names is None and set(images[0]) == {"image"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--dataset_name or --train_data_dir"),
        (["--validation_fraction", "1.5"], "1.5"),
        (["--validation_fraction", "0.5", "--validation_split", "train"], "Give either"),
        (["--max_train_samples", "9"], "9"),
    ],
)
def test_bad_options_are_refused(options, message, folder):
    source = ["--train_data_dir", str(folder)] if options else []
    with pytest.raises(ValueError, match=message):
        load_images(arguments(*source, *options))


# Streams


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Four parquet files of five images; image i of all is of the grey i, and of class i % 2."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds, at the end of each pass
    folder = tmp_path / "shards"
    folder.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["even", "odd"])})
    for shard in range(4):
        numbers = range(5 * shard, 5 * shard + 5)
        images = [PILImage.new("RGB", (16, 16), (number,) * 3) for number in numbers]
        rows = Dataset.from_dict({"image": images, "label": [n % 2 for n in numbers]}, features=features)
        rows.to_parquet(folder / f"train-{shard}.parquet")
    return folder


def stream(source, *options):
    args = arguments("--dataset_name", str(source), "--streaming", "--shuffle_buffer", "3", *options)
    args.train_batch_size = 2
    return load_images(args)


def greys(items, count):
    return [round((item["image"].mean().item() + 1) * 127.5) for item in itertools.islice(items, count)]


def test_stream_holds_every_image_once_a_pass_in_another_order(shards):
    images, _ = stream(shards)
    assert required_class_names(images) == ["even", "odd"] and images.num_images is None
    first, second = (greys(images, 40)[part] for part in (slice(20), slice(20, 40)))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != sorted(first)
    assert all(item["label"] == grey % 2 for item, grey in zip(images, first))
    assert greys(images.examples(4), 4) == greys(stream(shards)[0].examples(4), 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_begins_where_it_is_told(workers, shards):
    args = ["--dataloader_num_workers", str(workers), "--on_unreadable", "skip"]
    broken = Dataset.from_parquet(str(shards / "train-2.parquet")).cast_column("image", Image(decode=False))
    broken = broken.map(lambda row: {"image": {"bytes": b"?", "path": "x.png"}} if row["label"] else row)
    broken.to_parquet(shards / "train-2.parquet")

    def batches(first_batch, count, positions=None):
        images, _ = stream(shards, *args)
        images.positions = positions or images.positions
        loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=workers)
        came = [batch["image"] for batch in itertools.islice(images.from_batch(loader, first_batch), count)]
        return came, images.positions

    whole, _ = batches(0, 26)  # into the third pass
    for first_batch in (1, 2, 7, 13, 22):
        before, positions = batches(0, first_batch)
        rest, _ = batches(first_batch, 26 - first_batch, positions)
        assert all(torch.equal(a, b) for a, b in zip([*before, *rest], whole, strict=True))


def test_workers_of_a_stream_do_not_count_its_passes_for_each_other(shards):
    def batches():
        images, _ = stream(shards, "--dataloader_num_workers", "2")
        loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2)
        return torch.stack([batch["image"].mean() for batch in itertools.islice(images.from_batch(loader, 0), 800)])

    assert torch.equal(batches(), batches())  # 80 passes


def test_index_beyond_the_end_is_an_error(folder):
    images, _ = load_images(arguments("--train_data_dir", str(folder)))
    assert len(list(images)) == 8


def test_held_out_split_of_a_stream_is_a_dataset(shards):
    (shards / "train-3.parquet").rename(shards / "test-0.parquet")
    images, held_out = stream(shards, "--validation_split", "test")
    assert sorted(greys(images, 15)) == list(range(15))
    assert greys((held_out[i] for i in range(len(held_out))), 9) == [15, 16, 17, 18, 19]
    assert held_out.class_names == ["even", "odd"]


def test_classes_of_a_stream_are_numbers_if_it_is_said_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    source = parquet(tmp_path, {"image": Image(), "label": Value("int64")}, image=[picture(0)] * 2, label=[1, 4])
    with pytest.raises(ValueError, match="--num_classes"):
        stream(source, "--label_column", "label")
    with pytest.raises(ValueError, match=r"has label 4, which is not in 0 \.\.\. 3"):
        list(itertools.islice(stream(source, "--label_column", "label", "--num_classes", "4")[0], 2))
    with pytest.raises(ValueError, match="goes with --streaming"):
        load_images(arguments("--dataset_name", source, "--num_classes", "5"))
    images, _ = stream(source, "--label_column", "label", "--num_classes", "5")
    assert required_class_names(images) == ["0", "1", "2", "3", "4"]
    assert sorted(item["label"] for item in itertools.islice(images, 2)) == [1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation_fraction", "0.1"], "--validation_fraction needs all images"),
        (["--max_train_samples", "3"], "--max_train_samples needs all images"),
        (["--label_from", "filename_prefix"], "filename_prefix needs all names"),
        (["--dataloader_num_workers", "3"], "does not divide the number of files that each process reads, 4"),
        (["--num_classes", "0"], "--num_classes 0"),
        (["--shuffle_buffer", "0"], "--shuffle_buffer 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, message, shards):
    with pytest.raises(ValueError, match=message):
        stream(shards, *options)
