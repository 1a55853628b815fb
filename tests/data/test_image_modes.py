"""Grey images of more than 8 bits."""

import numpy as np
import pytest
from data_options import arguments, load_images
from PIL import Image as PILImage

from diffusers_adm.cli import main
from diffusers_adm.data.image_modes import to_mode
from diffusers_adm.data.image_sets import DatasetImages
from diffusers_adm.data.options import ImageFormat, ImageSetOptions
from diffusers_adm.training import train_unet
from diffusers_adm.training.configuration import as_command_line, as_yaml


RAMP = np.linspace(0, 1, 1024).reshape(32, 32)


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (RAMP.astype(np.float32), None),
        ((2 * RAMP - 1).astype(np.float32), (-1, 1)),
        ((RAMP * 4095).astype(np.uint16), (0, 4095)),
        ((RAMP * 65535).astype(np.uint16), (0, 65535)),
        ((RAMP * 4095 - 1024).astype(np.int32), (-1024, 3071)),
    ],
)
def test_a_known_range_becomes_all_greys(values, value_range):
    found = np.asarray(to_mode(PILImage.fromarray(values), 1, value_range))
    assert np.abs(found - 255 * RAMP).max() < 1
    assert len(np.unique(found)) == 256


@pytest.mark.parametrize("factor", [257, 16])
def test_sixteen_bits_are_scaled_without_rounding(factor):
    grey = np.arange(256).reshape(16, 16)
    values = (grey * factor).astype(np.uint16)
    assert np.array_equal(to_mode(PILImage.fromarray(values), 1, (0, 255 * factor)), grey)


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        ((RAMP * 4095).astype(np.uint16), None),
        (np.zeros((4, 4), np.uint16), None),  # by its kind, so that a set is refused at its first image
        ((RAMP * 4096).astype(np.uint16), (0, 4095)),
        ((RAMP * 4095 - 1024).astype(np.int32), (0, 4095)),
        ((RAMP * 255).astype(np.float32), None),
        ((RAMP - 0.1).astype(np.float32), None),
        (np.full((4, 4), np.nan, np.float32), None),
    ],
)
def test_values_of_another_range_are_refused(values, value_range):
    with pytest.raises(ValueError, match="of more than 8 bits is .*, but its values are in .* such as --image_range="):
        to_mode(PILImage.fromarray(values), 3, value_range)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_range_that_files_of_16_bits_cannot_hold_is_refused(mode):
    values = (RAMP * 65535).astype(np.uint16)
    image = PILImage.frombytes(mode, values.shape, values.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    assert np.abs(np.asarray(to_mode(image, 1, (0, 65535))) - 255 * RAMP).max() < 1
    with pytest.raises(ValueError, match="--image_range must be at most 65535 for images of 16 bits, but got 655350"):
        to_mode(image, 1, (0, 655350))


def test_a_set_is_grey_if_its_first_image_is(tmp_path):
    for number, mode in enumerate(("LA", "L")):
        PILImage.new(mode, (4, 4)).save(tmp_path / f"{number}.png")
    assert DatasetImages(tmp_path).shape == (4, 4, 1)


@pytest.fixture
def scans(tmp_path):
    """A folder of grey images of 12 bits, in two classes."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        PILImage.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / name / "scan.png")
    return str(tmp_path)


def test_option_says_the_range_of_a_dataset(scans, capsys):
    options = ["--train_data_dir", scans, "--in_channels", "1", "--crop", "center"]
    images, _ = load_images(arguments(*options))
    with pytest.raises(ValueError, match=r"Image .*scan\.png: .* is unknown, but its values are in \[0, 4095\]"):
        images[0]
    images, _ = load_images(arguments(*options, "--image_range", "0,4095"))
    assert images[0]["image"].min() < -0.9 and images[0]["image"].max() > 0.9

    assert main(["inspect-data", *options]) == 0
    assert "2 of more than 8 bits, values in [0, 4095], 2 refused\n" in capsys.readouterr().out
    assert main(["inspect-data", *options, "--image_range", "0,4095"]) == 0
    assert "2 of more than 8 bits, values in [0, 4095], 0 refused\n" in capsys.readouterr().out
    assert main(["inspect-data", *options, "--image_range", "5,5"]) == 2
    assert "--image_range 5.0,5.0 must be two increasing numbers." in capsys.readouterr().err


def test_images_to_evaluate_have_the_option_too(scans):
    with pytest.raises(ValueError, match="such as --image_range"):
        DatasetImages(scans)
    format = ImageFormat(resolution=None, in_channels=None, image_range=(0, 4095))
    images = DatasetImages(scans, ImageSetOptions(format=format))
    assert images.shape == (32, 32, 1)
    assert next(images.batches(2)).max() == 255


def test_negative_values_pass_through_files_of_options(tmp_path):
    words = f"--train_data_dir {tmp_path} --output_dir {tmp_path} --max_train_steps 1 --image_range=-1024,3071".split()
    options = train_unet.parse_args(words)
    assert "--image_range=-1024.0,3071.0" in as_command_line(options)
    (tmp_path / "options.yaml").write_text(as_yaml(options))
    again = train_unet.parse_args(["--config", str(tmp_path / "options.yaml")])
    assert again.format == options.format
