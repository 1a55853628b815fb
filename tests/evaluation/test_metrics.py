"""Metrics of samples and a reference on the command line: their values, and input that is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from digit_features import NAME as DIGITS
from distances import direct_precision_and_recall
from huggingface_hub import EvalResult, ModelCard
from image_files import digits_npz, random_images
from PIL import Image

from diffusers_adm.data.image_sets import open_images
from diffusers_adm.evaluation import (
    FeatureExtractor,
    GaussianStatistics,
    frechet_distance,
    inception_score,
    metrics,
    summarise,
)
from diffusers_adm.evaluation.metrics import kernel_distance


# Where the published example is: Inception's weights as torch-fidelity keeps them, and two files of the paper's authors.
PUBLISHED = {
    "weights": os.environ.get("INCEPTION_WEIGHTS"),
    "reference": os.environ.get("VIRTUAL_IMAGENET256_LABELED"),
    "samples": os.environ.get("ADMNET_GUIDED_UPSAMPLED_IMAGENET256"),
}


def test_score_is_of_parts_of_5000_in_their_order():
    certain = 100 * torch.eye(4)
    mixed = certain.repeat(2500, 1)
    assert inception_score(mixed) == pytest.approx(4, rel=1e-6)
    by_class = certain.repeat_interleave(2500, dim=0)  # two classes in each part
    assert inception_score(by_class) == pytest.approx(2, rel=1e-6)
    assert inception_score(torch.zeros(6000, 4)) == pytest.approx(1, rel=1e-6)


def test_kernel_distance_of_few_images_has_no_deviation():
    real, drawn = torch.randn(2, 1200, 3, generator=torch.Generator().manual_seed(0))
    few, note = kernel_distance(real[:500], drawn[:500])
    assert few.keys() == {"kernel_distance"} and note == "The kernel distance is that of all 500 images."
    swapped, _ = kernel_distance(drawn[:500], real[:500])
    assert few["kernel_distance"] == pytest.approx(swapped["kernel_distance"], abs=1e-5)
    many, note = kernel_distance(real, drawn)
    assert many["kernel_distance_std"] > 1e-4 and "100 subsets of 1000 images" in note


def test_samples_are_measured_against_a_reference_batch(reference, tmp_path, capsys):
    samples = digits_npz(tmp_path / "drawn.npz", random_images(30, seed=1), arr_1=np.zeros(30, dtype=np.int64))
    kept = EvalResult("text-to-image", "someone/data", "theirs", "fid", 12.0)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    card = ModelCard.load(tmp_path / "README.md")
    card.data.eval_results, card.data.model_name = [kept], "mine"
    card.save(tmp_path / "README.md")
    words = [reference, samples, "--feature_extractor", DIGITS, "--output", tmp_path / "found.json"]
    assert run("evaluate", *words, "--model_card", tmp_path / "README.md") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())

    features = [FeatureExtractor(DIGITS)(random_images(count, seed)) for count, seed in ((40, 0), (30, 1))]
    for kind, metric in (("pooled", "frechet_distance"), ("spatial", "spatial_frechet_distance")):
        real, drawn = (getattr(one, kind).double().numpy() for one in features)
        gaussians = [GaussianStatistics(one.mean(axis=0), np.cov(one, rowvar=False)) for one in (real, drawn)]
        assert found["metrics"][metric] == pytest.approx(frechet_distance(*gaussians), rel=1e-6)
    real, drawn = (one.pooled.double().numpy() for one in features)
    assert (found["metrics"]["precision"], found["metrics"]["recall"]) == direct_precision_and_recall(real, drawn)
    assert found["settings"]["samples"]["num_images"] == 30 and found["settings"]["feature_extractor"] == DIGITS
    assert f"| {DIGITS} | 30 samples |" in printed and "| FD |" in printed and "FID" not in printed
    assert "singular" in printed  # 64 features of 30 images

    run("evaluate", *words, "--model_card", tmp_path / "README.md")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert len(results) == len(found["metrics"]) + 1  # ours of before were replaced, and what is another's stays
    assert any(result.metric_value == 12.0 for result in results)
    by_type = {result.metric_type: result for result in results}
    assert by_type["recall"].metric_value == found["metrics"]["recall"]
    assert by_type["fd"].metric_name == f"FD ({DIGITS}, 30 samples)"


def test_a_folder_of_pictures_is_measured_as_the_same_images_in_a_file(reference, tmp_path):
    images = random_images(12, seed=3)
    for number, image in enumerate(images):
        path = tmp_path / "pictures" / str(number % 2) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    by_class = np.concatenate([images[::2], images[1::2]])
    figures = []
    for source in (digits_npz(tmp_path / "drawn.npz", by_class), tmp_path / "pictures"):
        output = tmp_path / "found.json"
        assert run("evaluate", reference, source, "--feature_extractor", DIGITS, "--output", output) == 0
        figures.append(json.loads(output.read_text())["metrics"])
    assert figures[0] == figures[1]


def test_score_of_a_folder_by_class_is_of_parts_in_which_classes_are_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "IMAGES_OF_A_SCORE", 10)
    images = random_images(40)
    (tmp_path / "png").mkdir()
    order = np.random.default_rng(0).permutation(40)
    with open(tmp_path / "png" / "manifest.jsonl", "w") as manifest:
        for number, label in enumerate(order % 4):
            path = tmp_path / "png" / "images" / f"{label:04d}" / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number, ..., 0]).save(path)
            manifest.write("{}\n")
    extractor = FeatureExtractor(DIGITS)
    as_drawn = summarise(open_images(tmp_path / "png", labelled=True), extractor)
    assert torch.equal(as_drawn.features.pooled, extractor(images).pooled) and as_drawn.mixed
    alone = summarise(open_images(tmp_path / "png"), extractor, keep=False)
    assert alone.features is None and np.array_equal(alone.gaussian.covariance, as_drawn.gaussian.covariance)
    (tmp_path / "run" / "samples_40x28x28x1").mkdir(parents=True)
    (tmp_path / "run" / "settings.json").touch()
    with pytest.raises(ValueError, match="is the folder of a sampling run. Pass its samples, .*samples_40x28x28x1"):
        open_images(tmp_path / "run")
    picture = next((tmp_path / "png").rglob("000000.png"))
    picture = picture.rename(picture.with_name("cat.png"))
    with pytest.raises(ValueError, match="must be numbers, .* but got .'cat'"):
        open_images(tmp_path / "png")
    picture.rename(picture.with_name("000000.png"))
    (tmp_path / "png" / "manifest.jsonl").unlink()
    by_class = open_images(tmp_path / "png", labelled=True)
    assert by_class.labels.tolist() == sorted(by_class.labels) and not by_class.mixed
    found = metrics.compare(as_drawn, summarise(by_class, extractor), DIGITS)
    assert any(note.startswith("IS is computed from random parts") for note in found.notes)


def cut_off(path: Path) -> Path:
    whole = digits_npz(path, random_images(40)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def test_small_images_of_a_dataset_are_those_that_an_upsampler_is_given(tmp_path):
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    for number, pixels in enumerate(random_images(12, size=64)):
        large = Image.fromarray(pixels[..., 0])
        large.save(tmp_path / "large" / f"{number}.png")
        large.reduce(2).save(tmp_path / "small" / f"{number}.png")
    options = ["--resolution", "32", "--source_resolution", "64", "--feature_extractor", DIGITS]
    words = [tmp_path / "large", tmp_path / "small", *options, "--output", tmp_path / "found.json"]
    assert run("evaluate", *words, "--samples_split", "train") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"]["frechet_distance"] == pytest.approx(0, abs=1e-6) and found["metrics"]["recall"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["make-reference", "x.npz", "new.npz"],
        ["evaluate", "x.npz", "x.npz"],
        ["sweep", "x.npz", "--output", "sweep"],
        ["nll", "x.npz", "--output", "nll"],
    ],
    ids=lambda words: words[0],
)
def test_images_of_an_npz_file_are_not_changed_in_silence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits_npz(tmp_path / "x.npz", random_images(9))
    assert run(*words, "--resolution", "16", "--source_resolution", "32") == 2
    assert "--resolution, --source_resolution must be left out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def pictures_of_two_sizes(folder: Path) -> Path:
    folder.mkdir()
    for number, size in enumerate((32, 32, 32, 40)):
        Image.fromarray(random_images(1, size=size)[0, ..., 0]).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: digits_npz(folder / "x.npz", random_images(3)), "has 3 images"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(1)), "has 1 images"),
        (lambda folder: digits_npz(folder / "x.npz", np.zeros((9, 32, 32, 1), np.uint8)), "all are the same"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9).astype(np.float32)), "uint8"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9, channels=3)), "in colour"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9, size=28)), "28x28"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9)[..., 0]), "images, height, width"),
        (lambda folder: digits_npz(folder / "x.npz", np.asfortranarray(random_images(9))), "Fortran order"),
        (lambda folder: cut_off(folder / "x.npz"), "damaged, incomplete"),
        (lambda folder: pictures_of_two_sizes(folder / "x"), "--resolution"),
        (lambda folder: folder / "x.npz", "does not exist"),
    ],
)
def test_samples_that_cannot_be_measured_are_refused_in_one_line(make, said, reference, tmp_path, capsys):
    (tmp_path / "found.json").write_text("{}")
    folder = tmp_path / "samples"
    folder.mkdir()
    words = [reference, make(folder), "--feature_extractor", DIGITS, "--output", tmp_path / "found.json"]
    assert run("evaluate", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusers-adm evaluate: error: ")
    assert any(part in error for part in said.split("|")), error
    assert (tmp_path / "found.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.skipif(None in PUBLISHED.values(), reason=f"needs the paths {', '.join(PUBLISHED)} in the environment")
def test_published_example(tmp_path):
    words = [PUBLISHED["reference"], PUBLISHED["samples"], "--feature_extractor_weights", PUBLISHED["weights"]]
    assert run("evaluate", *words, "--output", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert found["frechet_distance"] == pytest.approx(3.9426, abs=0.01)
    assert found["spatial_frechet_distance"] == pytest.approx(6.1404, abs=0.02)
    assert found["inception_score"] == pytest.approx(215.837, abs=0.3)
    # The published distances are of half precision.
    assert found["precision"] == pytest.approx(0.8265, abs=0.005)
    assert found["recall"] == pytest.approx(0.5309, abs=0.005)
