"""Sweeps: each point is evaluated once."""

import csv
import json

import numpy as np
from command_line import run
from digit_features import NAME as DIGITS
from PIL import Image


def test_sweep_measures_each_point_once(tmp_path, capsys):
    """Uses the default model, because the independent classifier knows its digits."""
    real = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    words = ["sweep", tmp_path / "real.npz", "--output", tmp_path / "sweep", "--num_samples", 8, "--batch_size", 8]
    words += [
        "--scheduler",
        "DDIM",
        "--num_inference_steps",
        2,
        "--guidance_scale",
        0,
        1.5,
        "--feature_extractor",
        DIGITS,
    ]
    assert run(*words) == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [result["point"]["guidance_scale"] for result in results] == [0, 1.5]
    with open(tmp_path / "sweep" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert (
        float(rows[1]["FD"]) == results[1]["metrics"]["frechet_distance"] != results[0]["metrics"]["frechet_distance"]
    )
    table = (tmp_path / "sweep" / "results.md").read_text()
    assert "| DDIM | 1.5 | 2 |" in table and DIGITS in table and "8 samples per point" in table
    with Image.open(tmp_path / "sweep" / "trade-off.png") as plot:
        assert plot.width > 1000
    metrics = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("metrics_*.json")}
    assert len(metrics) == 2

    assert run(*words, "--condition_unet", "true", "false") == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert len(results) == 4
    assert results[0]["settings"]["samples"]["metadata"]["scheduler"] == "DDIMScheduler"
    unconditional = results[1]["settings"]["samples"]["metadata"]["call"]
    assert unconditional["condition_unet"] is False and unconditional["guidance_scale"] == 0

    # A point is measured anew against another reference.
    np.savez(tmp_path / "real.npz", arr_0=255 - real)
    assert run(*words) == 0
    assert all(path.stat().st_mtime_ns != before for path, before in metrics.items())
