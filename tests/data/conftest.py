"""A folder of images."""

import pytest
from data_options import picture


@pytest.fixture
def folder(tmp_path):
    """Two subfolders, "cat" of six images and "dog" of two."""
    for name, count in (("cat", 6), ("dog", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(i).save(tmp_path / name / f"{i}.png")
    return tmp_path
