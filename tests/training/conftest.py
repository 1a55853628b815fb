"""Dataset and pretrained pipeline of small training runs."""

import pytest
from tiny_models import tiny_classifier, tiny_pipeline, tiny_unet
from training_runs import TINY_UNET, save_bars


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder with a parquet file of 14 images of 12x12 pixels: white on the left (class "left") or on the right."""
    folder = tmp_path_factory.mktemp("bars")
    save_bars(folder)
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Folder of a pipeline with a classifier, whose models are tiny."""
    folder = tmp_path_factory.mktemp("start")
    classifier = tiny_classifier(in_channels=1, num_classes=2, sample_size=16, attention_resolutions=(8,))
    tiny_pipeline(tiny_unet(**TINY_UNET), classifier=classifier, id2label={0: "left", 1: "right"}).save_pretrained(
        folder
    )
    return folder
