"""Datasets of users, and the items that are made from them."""

import re

import numpy as np
import pytest
import torch
from data_options import arguments, load_images, parquet, picture
from datasets import ClassLabel, Image
from PIL import Image as PILImage

from diffusers_adm.cli import main
from diffusers_adm.data.image_modes import to_mode
from diffusers_adm.training.low_res import shrink


def test_held_out_fraction_is_of_each_class(folder):
    images, held_out = load_images(arguments("--train_data_dir", str(folder), "--validation_fraction", "0.5"))
    for part in (images, held_out):
        assert sorted(part[i]["label"] for i in range(len(part))) == [0, 0, 0, 1]
    everything, _ = load_images(arguments("--train_data_dir", str(folder), "--no-random_flip"))
    assert len(everything) == 8


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
    assert re.search(r"1 unreadable\n.*1\.png: it is damaged", out)
    assert main(["inspect-data", "--train_data_dir", str(folder), "--resolution", "24", "--crop", "pad"]) == 0
    assert "1 larger than 24 pixels: --crop pad would refuse them" in capsys.readouterr().out
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
        with pytest.raises(
            ValueError, match=f"--source_resolution must be a multiple of --resolution 16 and larger, but got {size}"
        ):
            load_images(arguments(*options, "--source_resolution", str(size)))


def test_all_modes_become_eight_bit_grey_or_colour(tmp_path):
    grey = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    image = PILImage.fromarray(grey)
    for made in (image, image.convert("RGB"), image.convert("P"), image.convert("LA")):
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


def test_missing_image_and_image_that_does_not_fit_are_named(tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"]), "mask": Image()}
    pictures = [picture(0), None, picture(1)]
    masks = [{"bytes": b"damaged", "path": None}] * 3  # which are not read
    source = ["--dataset_name", parquet(tmp_path, features, image=pictures, label=[0, 1, 1], mask=masks)]
    source += ["--image_column", "image"]
    images, _ = load_images(arguments(*source))
    with pytest.raises(ValueError, match="number 1 cannot be read"):
        images[1]
    images, _ = load_images(arguments(*source, "--on_unreadable", "skip"))
    assert images[1]["label"] == 1
    images, _ = load_images(arguments(*source, "--crop", "pad"))
    with pytest.raises(ValueError, match="number 2: --crop pad requires images of at most"):
        images[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--dataset_name and --train_data_dir"),
        (["--validation_fraction", "1.5"], "1.5"),
        (["--validation_fraction", "0.1"], "--validation_fraction 0.1 cannot hold out images of each class"),
        (["--validation_fraction", "0.5", "--validation_split", "train"], "Pass at most one of"),
        (["--max_train_samples", "9"], "9"),
        (["--label_column", "image"], r"one of the other columns of split 'train', \['label'\], but got 'image'"),
        (
            ["--train_data_dir", "my_imagse"],
            "--train_data_dir must be a folder of images, but there is no folder my_imagse",
        ),
    ],
)
def test_bad_options_are_refused(options, message, folder):
    source = ["--train_data_dir", str(folder)] if options else []
    with pytest.raises(ValueError, match=message):
        load_images(arguments(*source, *options))


def test_index_beyond_the_end_is_an_error(folder):
    images, _ = load_images(arguments("--train_data_dir", str(folder)))
    assert len(list(images)) == 8
