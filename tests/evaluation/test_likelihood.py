"""The variational bound equals recorded values and closed forms, and is measured on datasets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from diffusers import DDIMScheduler, DDPMScheduler
from golden_cases import draw_weights, load_case, published_flags
from PIL import Image
from tiny_models import NUM_CLASSES, SIZE, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.data.image_sets import open_images
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.evaluation.likelihood import numbers_of_classes, variational_bound
from diffusers_adm.evaluation.shards import image_generator


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny pipeline."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_bound_and_its_terms_equal_the_published_ones():
    case, io = load_case("losses")
    unet_case, _ = load_case(case["unet"])
    unet = ADMUNet2DModel.from_openai(draw_weights(unet_case), published_flags(unet_case))
    recorded = case["bpd"]
    config = DDPMScheduler(beta_schedule=recorded["schedule"]).config
    schedule = NoiseSchedule.from_config(config, recorded["timestep_respacing"])
    torch.manual_seed(recorded["seed"])
    bound = variational_bound(unet, schedule, io["x_start"], io["class_labels"])
    published = {
        "total": "total_bpd",
        "prior": "prior_bpd",
        "terms": "vb",
        "x_0_mse": "xstart_mse",
        "epsilon_mse": "mse",
    }
    for ours, theirs in published.items():
        expected = io[f"bpd|{theirs}"]
        expected = expected.flip(1) if expected.ndim == 2 else expected  # published from the last step to the first
        torch.testing.assert_close(getattr(bound, ours), expected, rtol=2e-5, atol=1e-7, msg=lambda m: f"{ours}: {m}")


def test_likelihood_of_a_dataset_is_the_mean_of_its_images(model, tmp_path, capsys):
    pipeline = tiny_pipeline()
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 3, 4])
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=labels)
    words = ["nll", tmp_path / "images.npz", "--model", model, "--timestep_respacing", "4", "--batch_size", 2]
    assert run(*words, "--output", tmp_path / "run") == 0
    found = json.loads((tmp_path / "run" / "nll.json").read_text())

    x_0 = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, "4")
    generators = [image_generator(0, number) for number in range(5)]
    bound = variational_bound(pipeline.unet, schedule, x_0, torch.from_numpy(labels), generators)
    assert found["bits_per_dim"] == pytest.approx(bound.total.mean().item(), rel=1e-5)
    assert found["prior_bits_per_dim"] == pytest.approx(bound.prior.mean().item(), rel=1e-5)
    assert found["num_images"] == 5 and found["num_steps"] == 4
    with open(tmp_path / "run" / "terms.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["timestep"]) for row in rows] == schedule.timesteps.tolist()
    for row, term in zip(rows, bound.terms.mean(dim=0).tolist()):
        assert float(row["bits_per_dim"]) == pytest.approx(term, rel=1e-4)
    with Image.open(tmp_path / "run" / "terms.png") as plot:
        assert plot.width > 1000

    (tmp_path / "run" / "shards" / "000001.npz").unlink()
    assert run(*words, "--output", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "nll.json").read_text()) == found
    assert run(*words, "--output", tmp_path / "run", "--seed", 1) == 2
    assert "other settings: seed" in capsys.readouterr().err
    np.savez(tmp_path / "images.npz", arr_0=255 - images, arr_1=labels)
    assert run(*words, "--output", tmp_path / "run") == 2
    assert "other settings: images" in capsys.readouterr().err


def test_classes_of_images_are_found_by_their_names(tmp_path, caplog, capsys):
    names = ["ape", "bear", "cat, kitten", "dog", "emu"]
    tiny_pipeline(id2label=dict(enumerate(names))).save_pretrained(tmp_path / "tiny")
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    for number, name in enumerate(["dog", "dog", "kitten", "kitten"]):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(tmp_path / "images" / name / f"{number}.png")
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.array([3, 3, 2, 2]))
    words = ["--model", tmp_path / "tiny", "--timestep_respacing", "4", "--output"]

    def bound(images, folder):
        assert run("nll", images, *words, tmp_path / folder) == 0
        return json.loads((tmp_path / folder / "nll.json").read_text())["bits_per_dim"]

    expected = bound(tmp_path / "images.npz", "file")
    assert bound(tmp_path / "images", "folder") == pytest.approx(expected, rel=1e-6)
    assert bound(f"{tmp_path}/../{tmp_path.name}/images/", "folder") == pytest.approx(expected, rel=1e-6)  # continues
    assert run("nll", tmp_path / "images", *words, tmp_path / "first", "--num_images", 2) == 0
    assert "The first 2 of 4 images may be of a few classes only" in caplog.text
    (tmp_path / "images" / "kitten").rename(tmp_path / "images" / "cow")
    assert run("nll", tmp_path / "images", *words, tmp_path / "other") == 2
    assert "must be called like one class of the pipeline, but ['cow'] are not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "known", "numbers"),
    [
        (["0", "1", "2"], {0: "ape", 1: "bear", 2: "cat", 3: "dog"}, [0, 1, 2]),  # numbers without names
        (["crane", "crane", "gull"], {0: "crane", 1: "crane", 2: "gull"}, [0, 1, 2]),  # as in ImageNet
        (["n01", "n02"], {0: "tench", 1: "goldfish"}, [0, 1]),  # other names of the same classes
        (["goldfish", "tench"], {0: "tench, Tinca tinca", 1: "goldfish"}, [1, 0]),
        (["b", "a"], None, [0, 1]),
    ],
)
def test_numbers_of_classes(names, known, numbers):
    assert numbers_of_classes(names, known, len(known or names)).tolist() == numbers


@pytest.mark.parametrize("names", [["tench", "cow"], ["crane", "tench"], ["n01"]])
def test_classes_that_are_not_one_of_the_pipelines_are_refused(names):
    with pytest.raises(ValueError, match="must be called like one class of the pipeline"):
        numbers_of_classes(names, {0: "crane", 1: "crane", 2: "tench"}, 3)


def test_samples_keep_their_classes(tmp_path):
    """Folders of samples are called by the numbers of the classes, of which some may be missing."""
    tiny_pipeline(num_inference_steps=2).save_pretrained(tmp_path / "tiny")
    (tmp_path / "labels.txt").write_text("3\n4\n1\n3\n")
    words = ["--model", tmp_path / "tiny", "--num_samples", 4, "--batch_size", 4, "--labels", tmp_path / "labels.txt"]
    assert run("sample", *words, "--format", "png", "--output", tmp_path / "drawn") == 0
    images = open_images(tmp_path / "drawn" / f"samples_4x{SIZE}x{SIZE}x3", labelled=True)
    assert images.labels.tolist() == [3, 4, 1, 3]


def test_clipping_and_the_null_class_are_as_asked_for(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True))
    pipeline.save_pretrained(tmp_path / "tiny")
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.array([-1, 0, 1]))  # labels that nothing takes
    x_0 = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, "3")
    words = [
        "nll",
        tmp_path / "images.npz",
        "--model",
        tmp_path / "tiny",
        "--timestep_respacing",
        "3",
        "--unconditional",
    ]
    for flag, clip in (("--clip_denoised", True), ("--no-clip_denoised", False)):
        assert run(*words, flag, "--num_images", 2, "--output", tmp_path / flag) == 0
        found = json.loads((tmp_path / flag / "nll.json").read_text())
        generators = [image_generator(0, number) for number in range(2)]
        null = torch.full((2,), NUM_CLASSES)
        bound = variational_bound(pipeline.unet, schedule, x_0[:2], null, generators, clip_denoised=clip)
        assert found["bits_per_dim"] == pytest.approx(bound.total.mean().item(), rel=1e-5)


def test_likelihood_refuses_what_does_not_fit(model, tmp_path, capsys):
    images = np.zeros((3, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", arr_0=images)
    np.savez(tmp_path / "wrong.npz", arr_0=images, arr_1=np.array([0, 1, NUM_CLASSES]))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((3, 2 * SIZE, SIZE, 3), dtype=np.uint8))
    for name, said in (("unlabelled", "have none"), ("wrong", "must be in [0"), ("large", "the size of the UNet")):
        words = ["nll", tmp_path / f"{name}.npz", "--model", model, "--output", tmp_path / "run"]
        assert run(*words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    words = ["nll", tmp_path / "unlabelled.npz", "--model", model, "--output", tmp_path / "run", "--unconditional"]
    assert run(*words) == 2
    assert "null class" in capsys.readouterr().err


def test_a_bound_that_is_not_finite_is_an_error_and_is_not_kept(tmp_path, capsys):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    with torch.no_grad():
        list(pipeline.unet.parameters())[-1].fill_(torch.nan)
    pipeline.save_pretrained(tmp_path / "nan")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, SIZE, SIZE, 3), dtype=np.uint8))
    words = ["--model", tmp_path / "nan", "--timestep_respacing", 2, "--output", tmp_path / "run"]
    assert run("nll", tmp_path / "images.npz", *words) == 2
    assert "The bound must be finite, but it is not for images [0, 1, 2]" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.npz")) and not (tmp_path / "run" / "nll.json").exists()


def test_terms_of_a_perfect_network_are_those_of_its_variance_alone():
    """If x_0 is predicted exactly, each KL divergence is that of two Gaussians with the same mean."""
    x_0 = torch.zeros(2, 3, 8, 8)

    class Perfect(torch.nn.Module):
        learns_variance = False
        dtype = torch.float32

        def forward(self, x_t, timestep, class_labels):
            return type("Output", (), {"sample": x_0})

    schedule = NoiseSchedule.from_config(tiny_scheduler(DDIMScheduler).config, "10")
    bound = variational_bound(Perfect(), schedule, x_0, prediction_type="sample", variance_type="fixed_large")
    ratio = (schedule.log_beta - schedule.posterior_log_variance)[1:]
    expected = 0.5 * (ratio - 1 + (-ratio).exp()) / np.log(2)
    torch.testing.assert_close(bound.terms[0, 1:].double(), expected, rtol=1e-4, atol=1e-6)
    assert bound.x_0_mse.abs().max() == 0 and bound.epsilon_mse.abs().max() < 1e-6
    variance = 1 - schedule.alpha_bar[-1]
    prior = 0.5 * (variance - 1 - variance.log()) / np.log(2)
    torch.testing.assert_close(bound.prior[0].double(), prior, rtol=1e-4, atol=1e-9)
