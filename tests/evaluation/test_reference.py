"""Reference batches: their content, and batches that are refused."""

import json
from pathlib import Path

import numpy as np
from command_line import run
from digit_features import NAME as DIGITS
from image_files import digits_npz, random_images

from diffusers_adm.evaluation import (
    FeatureExtractor,
)
from diffusers_adm.evaluation.feature_options import INCEPTION


def test_a_reference_holds_statistics_of_all_and_some_of_the_images(tmp_path):
    images = random_images(50)
    source = digits_npz(tmp_path / "real.npz", images)
    output = tmp_path / "reference.npz"
    assert run("make-reference", source, output, "--feature_extractor", DIGITS, "--num_neighbours", 8) == 0
    with np.load(output, allow_pickle=False) as arrays:
        features = FeatureExtractor(DIGITS)(images)
        np.testing.assert_allclose(arrays["mu"], features.pooled.double().mean(dim=0), rtol=1e-6)
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(features.spatial.double(), rowvar=False), atol=1e-6)
        kept = arrays["arr_0"]
        metadata = json.loads(str(arrays["metadata"]))
    places = [next(i for i in range(50) if np.array_equal(images[i], image)) for image in kept]
    assert len(places) == 8 and places == sorted(set(places))
    assert metadata["num_images"] == 50 and metadata["feature_extractor"] == DIGITS
    before = output.read_bytes()
    assert run("make-reference", source, output, "--feature_extractor", DIGITS) == 2
    assert output.read_bytes() == before


def test_statistics_without_images_give_distances_alone(reference, tmp_path, capsys):
    with np.load(reference) as arrays:
        np.savez(tmp_path / "statistics.npz", **{name: arrays[name] for name in arrays.files if name != "arr_0"})
    samples = digits_npz(tmp_path / "drawn.npz", random_images(10, seed=1))
    assert run("evaluate", tmp_path / "statistics.npz", samples, "--feature_extractor", DIGITS) == 0
    printed = capsys.readouterr().out
    assert "| sFD |" in printed and "| precision |" not in printed and "no images (arr_0)" in printed


def published_statistics(path: Path) -> Path:
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    return path


def test_a_reference_of_another_extractor_is_refused(tmp_path, capsys):
    samples = digits_npz(tmp_path / "drawn.npz", random_images(10))
    published = published_statistics(tmp_path / "published.npz")
    assert run("evaluate", published, samples, "--feature_extractor", DIGITS) == 2
    error = capsys.readouterr().err
    assert f"made with the feature extractor {INCEPTION}" in error and f"Pass --feature_extractor {INCEPTION}" in error
    assert run("make-reference", samples, tmp_path / "own.npz", "--feature_extractor", DIGITS) == 0
    with np.load(tmp_path / "own.npz") as arrays:
        record = json.loads(str(arrays["metadata"]))
        np.savez(tmp_path / "own.npz", **{**arrays, "metadata": json.dumps({**record, "weights": "0" * 32})})
    assert run("evaluate", tmp_path / "own.npz", samples, "--feature_extractor", DIGITS) == 2
    assert "made with other weights of the feature extractor" in capsys.readouterr().err
    assert run("evaluate", samples, samples, "--feature_extractor", "unknown") == 2
    assert "but got 'unknown'" in capsys.readouterr().err
