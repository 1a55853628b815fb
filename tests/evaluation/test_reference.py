"""Reference batches: their content, and batches that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from digit_features import NAME as DIGITS
from image_files import digits_npz, random_images
from PIL import Image

from diffusers_adm.evaluation import FeatureExtractor, summarise_reference
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


def test_another_size_is_refused_before_features_are_extracted(tmp_path):
    source = digits_npz(tmp_path / "real.npz", random_images(50))
    output = tmp_path / "reference.npz"
    assert run("make-reference", source, output, "--feature_extractor", DIGITS) == 0
    calls = []
    extractor = FeatureExtractor(DIGITS)
    extractor.network.register_forward_pre_hook(lambda *args: calls.append(args))
    for reference in (source, output):
        with pytest.raises(ValueError, match="32x32 pixels in grey, but have 16x16 pixels in colour. --resolution"):
            summarise_reference(reference, extractor, shape=(16, 16, 3))
    assert not calls


def test_samples_and_reference_are_told_apart(reference, tmp_path, capsys):
    samples = digits_npz(tmp_path / "drawn.npz", random_images(10))
    assert run("evaluate", samples, reference, "--feature_extractor", DIGITS) == 2
    assert "is a reference batch, which has statistics. Pass REFERENCE first" in capsys.readouterr().err
    assert run("evaluate", reference, reference, "--feature_extractor", DIGITS) == 0  # two of them can be compared
    # The column of the images is that of the reference. The samples have their own.
    for name, column in (("real", "picture"), ("drawn", "image")):
        rows = {column: list(map(Image.fromarray, random_images(10)[:, :, :, 0])), "other": [None] * 10}
        features = Features({column: ImageFeature(), "other": ImageFeature() if name == "real" else Value("string")})
        (tmp_path / name).mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / "train.parquet")
    words = [
        "evaluate",
        tmp_path / "real",
        tmp_path / "drawn",
        "--image_column",
        "picture",
        "--feature_extractor",
        DIGITS,
    ]
    assert run(*words) == 0


def test_crops_without_effect_are_refused(tmp_path, capsys):
    for crop, message in (("pad", "--crop pad requires --resolution"), ("random", "--crop random is for training")):
        assert run("make-reference", tmp_path, tmp_path / "new.npz", "--crop", crop) == 2
        assert message in capsys.readouterr().err
