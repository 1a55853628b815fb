"""Metrics against closed forms and direct computations; reference batches; what is refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from digit_features import NAME as DIGITS
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from torch_fidelity import FeatureExtractorInceptionV3

from diffusers_adm.data.image_sets import open_images
from diffusers_adm.data.npz import NpzFile, Rows, write_npz
from diffusers_adm.evaluation import (
    FeatureExtractor,
    GaussianStatistics,
    RunningStatistics,
    frechet_distance,
    inception_score,
    metrics,
    precision_and_recall,
    summarise,
)
from diffusers_adm.evaluation.features import INCEPTION, spatial_features


# Where the published example is: Inception's weights as torch-fidelity keeps them, and two files of the paper's authors.
PUBLISHED = {
    "weights": os.environ.get("INCEPTION_WEIGHTS"),
    "reference": os.environ.get("VIRTUAL_IMAGENET256_LABELED"),
    "samples": os.environ.get("ADMNET_GUIDED_UPSAMPLED_IMAGENET256"),
}


def digits_npz(path: Path, images: np.ndarray, **arrays) -> Path:
    np.savez(path, arr_0=images, **arrays)
    return path


def random_images(count: int, seed: int = 0, size: int = 32, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.fixture
def reference(tmp_path) -> Path:
    """A reference batch of 40 grey images."""
    source = digits_npz(tmp_path / "real.npz", random_images(40))
    assert run("make-reference", source, tmp_path / "reference.npz", "--feature_extractor", DIGITS) == 0
    return tmp_path / "reference.npz"


def test_distance_of_gaussians_is_the_closed_form():
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    first, second = generator.uniform(0.1, 3, 5), generator.uniform(0.1, 3, 5)
    shift = generator.normal(size=5)
    # Covariances that share their axes: the distance is that of the standard deviations along them.
    expected = ((first**0.5 - second**0.5) ** 2).sum() + (shift**2).sum()
    gaussians = [
        GaussianStatistics(mean, basis @ np.diag(variances) @ basis.T)
        for mean, variances in ((np.zeros(5), first), (shift, second))
    ]
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(gaussians[0], gaussians[0]) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="5 and of 3 features"):
        frechet_distance(gaussians[0], GaussianStatistics(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("fold", [1, 30, 2048])
def test_statistics_in_batches_are_those_of_all_at_once(fold, monkeypatch):
    monkeypatch.setattr(RunningStatistics, "ROWS_OF_A_FOLD", fold)
    features = torch.randn(103, 6, generator=torch.Generator().manual_seed(0)) + 1e4  # the mean must cost no digits
    running = RunningStatistics()
    for batch in features.split(10):
        running.update(batch)
    found = running.finish()
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def direct_precision_and_recall(reference: np.ndarray, samples: np.ndarray, neighbour: int = 3) -> tuple[float, float]:
    """All distances in float64, one by one."""

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=2), axis=1)[:, neighbour]
        return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii).any(axis=1).mean()

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("block_size", [7, 5000])
@pytest.mark.parametrize("kind", ["gaussian", "far from zero", "lattice", "outlier", "copies", "bfloat16"])
def test_precision_and_recall_are_those_of_all_distances(kind, block_size):
    generator = torch.Generator().manual_seed(1)
    reference, samples = torch.randn(60, 4, generator=generator), 0.7 * torch.randn(50, 4, generator=generator)
    if kind == "far from zero":
        reference, samples = reference + 1000, samples + 1000
    if kind == "lattice":  # on the edge of a ball lie many
        reference, samples = (3 * reference).round(), (3 * samples).round() + 1
    if kind == "outlier":
        reference[3] *= 1e3
    if kind == "copies":  # balls of radius 0
        reference, samples = reference[:15].repeat(4, 1), reference[:20].repeat(3, 1)
    if kind == "bfloat16":
        reference, samples = reference.bfloat16(), samples.bfloat16()
    found = precision_and_recall(reference, samples, block_size=block_size)
    assert found == direct_precision_and_recall(reference.double().numpy(), samples.double().numpy())


def test_precision_and_recall_of_known_sets():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # balls of radius 3, 2, 2, 3: all from -3 to 6
    samples = torch.tensor([[6.0], [6.25], [100.0], [-3.0]])  # the first and the last are on the edge
    assert precision_and_recall(line, samples) == (0.5, 1.0)
    assert precision_and_recall(line, line) == (1.0, 1.0)
    assert precision_and_recall(line, line + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="1 features, and the samples 2"):
        precision_and_recall(line, line.repeat(1, 2))
    with pytest.raises(ValueError, match="too large"):
        precision_and_recall(1e25 * line, line)


def test_score_is_of_parts_of_5000_in_their_order():
    certain = 100 * torch.eye(4)
    mixed = certain.repeat(2500, 1)
    assert inception_score(mixed) == pytest.approx(4, rel=1e-6)
    by_class = certain.repeat_interleave(2500, dim=0)  # two classes in each part
    assert inception_score(by_class) == pytest.approx(2, rel=1e-6)
    assert inception_score(torch.zeros(6000, 4)) == pytest.approx(1, rel=1e-6)


def test_spatial_features_run_over_rows_then_columns_then_seven_channels():
    row, column, channel = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(9), indexing="ij")
    maps = (100 * row + 10 * column + channel).permute(2, 0, 1)[None]  # (1, 9, 3, 2)
    expected = [100 * r + 10 * c + k for r in range(3) for c in range(2) for k in range(7)]
    assert spatial_features(maps).tolist() == [expected]


class BlankInception(FeatureExtractorInceptionV3):
    """Takes no weights."""

    def load_state_dict(self, state_dict):
        pass


def test_inception_gives_the_features_of_the_published_evaluator(tmp_path):
    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    blank = BlankInception(INCEPTION, ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(blank.state_dict(), tmp_path / "inception.pth")
    extractor = FeatureExtractor(INCEPTION, tmp_path / "inception.pth")
    seen = []
    extractor.network.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = random_images(2)
    features = extractor(grey)
    assert features.pooled.shape == (2, 2048) and features.logits.shape == (2, 1008)
    maps = extractor.network.Mixed_6d.branch1x1(seen[0])  # (2, 192, 17, 17)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    for y, x, channel in ((0, 0, 6), (3, 16, 0), (16, 5, 2)):
        assert torch.equal(features.spatial[:, (17 * y + x) * 7 + channel], maps[:, channel, y, x])
    torch.testing.assert_close(features.logits, features.pooled @ extractor.network.fc.weight.T)  # without the bias
    torch.testing.assert_close(extractor(grey.repeat(3, axis=3)).pooled, features.pooled)


def test_weights_are_loaded_without_running_what_is_in_their_file(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Harmful()))
    torch.save({"weight": Harmful()}, tmp_path / "zipped.pth")
    for name in ("weights.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=INCEPTION):
            FeatureExtractor(INCEPTION, tmp_path / name)
    assert not (tmp_path / "harmed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_arrays_are_read_and_written_in_blocks(tmp_path):
    array = np.arange(7 * 3 * 2, dtype=np.int32).reshape(7, 3, 2)
    np.savez_compressed(tmp_path / "theirs.npz", a=array, b=np.array(5.0))
    theirs = NpzFile(tmp_path / "theirs.npz")
    assert [len(block) for block in theirs.blocks("a", 3)] == [3, 3, 1]
    assert np.array_equal(np.concatenate(list(theirs.blocks("a", 3))), array) and theirs.read("b") == 5
    blocks = Rows(array.shape, array.dtype, iter([array[:4], array[4:]]))
    write_npz(tmp_path / "ours.npz", {"a": blocks, "text": np.array("text")})
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert np.array_equal(ours["a"], array) and ours["text"] == "text"
    before = (tmp_path / "ours.npz").read_bytes()
    with pytest.raises(ValueError, match="numbers came"):
        write_npz(tmp_path / "ours.npz", {"a": Rows((8, 3, 2), array.dtype, [array])})
    assert (tmp_path / "ours.npz").read_bytes() == before and not list(tmp_path.glob("partial-*"))


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
    picture = next((tmp_path / "png").rglob("000000.png"))
    picture = picture.rename(picture.with_name("cat.png"))
    with pytest.raises(ValueError, match="called by their numbers: got .'cat'"):
        open_images(tmp_path / "png")
    picture.rename(picture.with_name("000000.png"))
    (tmp_path / "png" / "manifest.jsonl").unlink()
    by_class = open_images(tmp_path / "png", labelled=True)
    assert by_class.labels.tolist() == sorted(by_class.labels) and not by_class.mixed
    found = metrics.compare(as_drawn, summarise(by_class, extractor), DIGITS)
    assert any(note.startswith("IS: ") for note in found.notes)


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
    assert "--resolution, --source_resolution: for datasets only" in capsys.readouterr().err
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
        (lambda folder: digits_npz(folder / "x.npz", np.zeros((9, 32, 32, 1), np.uint8)), "all the same"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9).astype(np.float32)), "uint8"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9, channels=3)), "in colour"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9, size=28)), "28x28"),
        (lambda folder: digits_npz(folder / "x.npz", random_images(9)[..., 0]), "number, height, width"),
        (lambda folder: digits_npz(folder / "x.npz", np.asfortranarray(random_images(9))), "by columns"),
        (lambda folder: cut_off(folder / "x.npz"), "cut off"),
        (lambda folder: pictures_of_two_sizes(folder / "x"), "--resolution"),
        (lambda folder: folder / "x.npz", "no file"),
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


def test_a_reference_of_another_extractor_is_refused(tmp_path, capsys):
    samples = digits_npz(tmp_path / "drawn.npz", random_images(10))
    published = published_statistics(tmp_path / "published.npz")
    assert run("evaluate", published, samples, "--feature_extractor", DIGITS) == 2
    assert f"statistics of {INCEPTION}, and not of {DIGITS}" in capsys.readouterr().err
    assert run("evaluate", published, samples, "--feature_extractor", "unknown") == 2
    assert "'unknown' is not one of" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused():
    features = torch.randn(10, 3)
    features[4, 1] = torch.nan
    with pytest.raises(ValueError, match="samples are not finite"):
        precision_and_recall(torch.randn(10, 3), features)
    running = RunningStatistics()
    running.update(features)
    with pytest.raises(ValueError, match="not finite"):
        running.finish()


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
