"""Streams of labelled images."""

import itertools
from pathlib import Path

import datasets
import pytest
import torch
from data_options import arguments, load_images, parquet, picture
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from diffusers_adm.data.datasets import required_class_names


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Sets the seconds that datasets waits at the end of each pass. datasets 4.0 does not wait."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def shards(tmp_path):
    """Four parquet files of five images; image i of all is of the grey i, and of class i % 2."""
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


@pytest.mark.slow
def test_workers_of_a_stream_do_not_count_its_passes_for_each_other(shards):
    def batches():
        images, _ = stream(shards, "--dataloader_num_workers", "2")
        loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2)
        return torch.stack([batch["image"].mean() for batch in itertools.islice(images.from_batch(loader, 0), 800)])

    assert torch.equal(batches(), batches())  # 80 passes


def test_held_out_split_of_a_stream_is_a_dataset(shards, tmp_path):
    (shards / "train-3.parquet").rename(shards / "test-0.parquet")
    cache = tmp_path / "cache"
    images, held_out = stream(shards, "--validation_split", "test", "--cache_dir", str(cache))
    assert all(Path(file["filename"]).is_relative_to(cache) for file in held_out.rows.cache_files)
    assert sorted(greys(images, 15)) == list(range(15))
    assert greys((held_out[i] for i in range(len(held_out))), 9) == [15, 16, 17, 18, 19]
    assert held_out.class_names == ["even", "odd"]


def test_classes_of_a_stream_are_numbers_if_it_is_said_how_many(tmp_path):
    source = parquet(tmp_path, {"image": Image(), "label": Value("int64")}, image=[picture(0)] * 2, label=[1, 4])
    with pytest.raises(ValueError, match="--num_classes"):
        stream(source, "--label_column", "label")
    # Early versions of datasets check the labels of a stream themselves.
    with pytest.raises(
        ValueError, match=r"must be in \[0, 3\], but image .* has the label 4|Class label 4 greater than"
    ):
        list(itertools.islice(stream(source, "--label_column", "label", "--num_classes", "4")[0], 2))
    with pytest.raises(ValueError, match="--num_classes requires --streaming"):
        load_images(arguments("--dataset_name", source, "--num_classes", "5"))
    images, _ = stream(source, "--label_column", "label", "--num_classes", "5")
    assert required_class_names(images) == ["0", "1", "2", "3", "4"]
    assert sorted(item["label"] for item in itertools.islice(images, 2)) == [1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation_fraction", "0.1"], "--validation_fraction requires all images"),
        (["--max_train_samples", "3"], "--max_train_samples requires all images"),
        (["--label_from", "filename_prefix"], "filename_prefix requires all file names"),
        (["--dataloader_num_workers", "3"], "--dataloader_num_workers must divide 4, .* but got 3"),
        (["--num_classes", "0"], "--num_classes requires .* but got 0"),
        (["--shuffle_buffer", "0"], "--shuffle_buffer"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, message, shards):
    with pytest.raises(ValueError, match=message):
        stream(shards, *options)
