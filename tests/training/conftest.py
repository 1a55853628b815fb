"""The dataset of small training runs."""

import pytest
from training_runs import save_bars


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder with a parquet file of 14 images of 12x12 pixels: white on the left (class "left") or on the right."""
    folder = tmp_path_factory.mktemp("bars")
    save_bars(folder)
    return folder
