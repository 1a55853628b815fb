"""Sweeps: each point is evaluated once."""

import csv
import json
from textwrap import dedent

import numpy as np
import torch
from command_line import run
from digit_classifier import load_digit_classifier
from digit_features import NAME as DIGITS
from image_files import arrays_of, digits_npz, random_images
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

    # A point is measured anew against another reference, and with other samples.
    np.savez(tmp_path / "real.npz", arr_0=255 - real)
    assert run(*words) == 0
    assert all(path.stat().st_mtime_ns != before for path, before in metrics.items())
    first = json.loads((tmp_path / "sweep" / "results.json").read_text())
    for path in [*(tmp_path / "sweep").rglob("samples_*.npz"), *(tmp_path / "sweep").rglob("shards/*")]:
        path.unlink()
    assert run(*words, "--seed", 1) == 0
    again = json.loads((tmp_path / "sweep" / "results.json").read_text())
    for before, after in zip(first, again):
        assert before["metrics"]["frechet_distance"] != after["metrics"]["frechet_distance"]


def test_points_that_cannot_be_drawn_are_refused_before_the_first_one(reference, tmp_path, capsys):
    words = ["sweep", reference, "--output", tmp_path / "sweep", "--feature_extractor", DIGITS]
    (tmp_path / "labels.txt").write_text("1\n2\n3\n4\n")
    for more, message in (
        (["--weaker", "perturbed_attention"], "`weaker` requires a `cfg_weight`"),
        (["--epsilon_scale", 1, -1], "`epsilon_scale` must be above 0"),
        (["--particles", 4, "--guidance_scale", 1, 0], "`particles` requires a `guidance_scale`"),
        (
            ["--guidance_scale", 1, 0, "--condition_unet", "true", "false", "--labels", tmp_path / "labels.txt"],
            "--labels requires a network with classes in this run",
        ),
        (["--guidance_scale", 0, 1, "--guidance_options", '{"interval": [900, 950]}'], "must let guidance act at one"),
    ):
        assert run(*words, "--num_samples", 4, *more) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "sweep").exists()


def test_a_point_that_fails_does_not_stop_the_others(reference, tmp_path, capsys):
    (tmp_path / "guide.py").write_text(
        "import torch\n\n\ndef build(pipeline):\n    return lambda x_t, timestep, x_0, labels: torch.full_like(x_t, torch.inf)\n"
    )
    words = ["sweep", reference, "--output", tmp_path / "sweep", "--feature_extractor", DIGITS, "--num_samples", 5]
    words += ["--num_inference_steps", 1, "--guidance_fn", f"{tmp_path / 'guide.py'}:build", "--guidance_scale", 1, 0]
    for _ in range(2):
        assert run(*words) == 2
        printed = capsys.readouterr()
        assert "1 of 2 points failed: " in printed.err and "is not finite" in printed.out
    (result,) = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert result["point"]["guidance_scale"] == 0

    # Other settings in the same folder are a mistake of the whole sweep, and change nothing.
    before = (tmp_path / "sweep" / "results.json").read_bytes()
    assert run(*words, 2, "--seed", 1) == 2
    assert "holds a run with other settings: seed was 0 and is 1" in capsys.readouterr().err
    assert (tmp_path / "sweep" / "results.json").read_bytes() == before


def test_sweep_takes_the_labels_of_the_small_images(tmp_path):
    digits_npz(tmp_path / "real.npz", random_images(8))
    digits_npz(tmp_path / "small.npz", random_images(6, size=16), arr_1=np.full(6, 7))
    words = [
        "sweep",
        tmp_path / "real.npz",
        "--model",
        "shipped:adm-mnist-16-32-upsampler",
        "--output",
        tmp_path / "sweep",
    ]
    words += [
        "--low_res",
        tmp_path / "small.npz",
        "--num_samples",
        6,
        "--num_inference_steps",
        1,
        "--feature_extractor",
        DIGITS,
    ]
    assert run(*words) == 0
    (samples,) = (tmp_path / "sweep" / "points").glob("*/samples_*.npz")
    assert arrays_of(samples)["arr_1"].tolist() == [7] * 6


def test_sweep_counts_the_images_that_show_the_requested_class(tmp_path, capsys):
    real = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    words = [
        "sweep",
        tmp_path / "real.npz",
        "--output",
        tmp_path / "sweep",
        "--num_samples",
        10,
        "--labels",
        "balanced",
    ]
    words += ["--scheduler", "DDIM", "--num_inference_steps", 6, "--condition_unet", "false", "--judged"]
    assert run(*words, "--feature_extractor", DIGITS, "--guidance_scale", 0, 1) == 0
    unguided, result = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert "accuracy" not in unguided["metrics"]
    (samples,) = (tmp_path / "sweep" / "points").glob("DDIM_1_*/samples_*.npz")
    with np.load(samples) as arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        right = load_digit_classifier()(images).argmax(dim=1).numpy() == arrays["arr_1"]
    assert 0 < result["metrics"]["accuracy"] == right.mean() < 1
    out = capsys.readouterr().out
    assert f"{right.mean():.4f} |" in out and "|  |\n" in out
    assert run(*words, "--feature_extractor", DIGITS, "--guidance_scale", 0) == 2
    assert "no point of this sweep draws a requested class" in capsys.readouterr().err

    # A guidance function is given the labels too. An infinite bound is recorded as text.
    (tmp_path / "guide.py").write_text(
        "from diffusers_adm.guidance import ClassifierGuidance\n\n\ndef build(pipeline):\n"
        "    return ClassifierGuidance(pipeline.classifier)\n"
    )
    more = ["--guidance_fn", f"{tmp_path / 'guide.py'}:build", "--guidance_options", '{"interval": [1, Infinity]}']
    assert run(*words, "--feature_extractor", DIGITS, *more) == 0
    (result,) = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert 0 < result["metrics"]["accuracy"] < 1 and result["point"]["guidance_options"] == {"interval": [1, "inf"]}

    without_logits = """
        from digit_features import DigitFeatures
        from torch_fidelity import register_feature_extractor


        class Features(DigitFeatures):
            @staticmethod
            def get_default_feature_layer_for_metric(metric):
                return "pooled"


        register_feature_extractor("without-logits", Features)
    """
    (tmp_path / "features.py").write_text(dedent(without_logits))
    words += ["--register", tmp_path / "features.py", "--feature_extractor", "without-logits"]
    assert run(*words) == 2
    assert "(--judged) requires a feature extractor that is a classifier" in capsys.readouterr().err
