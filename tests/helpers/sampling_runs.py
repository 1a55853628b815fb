"""Runs of `diffusers-adm sample` with a tiny model."""

from pathlib import Path

import numpy as np
from command_line import run
from image_files import arrays_of
from tiny_models import SIZE


def sample(model: Path, output: Path, *words: str | Path, num_samples: int = 10) -> dict[str, np.ndarray]:
    """The arrays of a run, drawn four at a time."""
    common = ["--model", model, "--output", output, "--num_samples", num_samples, "--batch_size", 4]
    assert run("sample", *common, *words) == 0
    return arrays_of(output / f"samples_{num_samples}x{SIZE}x{SIZE}x3.npz")
