"""A model and a reference batch for the tests of the evaluation."""

from pathlib import Path

import pytest
from command_line import run
from digit_features import NAME as DIGITS
from image_files import digits_npz, random_images
from tiny_models import tiny_pipeline


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> Path:
    """A tiny pipeline that draws in three steps."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(num_inference_steps=3).save_pretrained(folder)
    return folder


@pytest.fixture
def reference(tmp_path) -> Path:
    """A reference batch of 40 grey images."""
    source = digits_npz(tmp_path / "real.npz", random_images(40))
    assert run("make-reference", source, tmp_path / "reference.npz", "--feature_extractor", DIGITS) == 0
    return tmp_path / "reference.npz"
