"""Installation: the wheel holds everything, importing is cheap, and the default model draws digits anywhere."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from command_line import run
from diffusers import DDIMScheduler
from digit_classifier import load_digit_classifier
from lowest_versions import lowest_versions
from photo_classifier import load_photo_classifier
from PIL import Image

import diffusers_adm
from diffusers_adm import (
    ADMUpsamplePipeline,
    ClassifierGuidedPipeline,
    default_cascade,
    default_consistency_model,
    default_model,
    default_photo_consistency_model,
    default_photo_model,
)
from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.export.sources import load_network
from diffusers_adm.pipelines.cascade import draw_cascade
from diffusers_adm.records import weights_digest


ROOT = Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> str:
    """Returns the output of a fresh interpreter that is started outside the checkout."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_each_dependency_has_one_lowest_version():
    names = [word.partition("==")[0] for word in lowest_versions()]
    assert len(names) == len(set(names)) and {"torch", "torchvision"} <= set(names)


def test_wheel_of_the_source_distribution_draws_outside_the_checkout(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    hidden = source / "docs" / "notebooks" / ".ruff_cache" / "cache"
    hidden.parent.mkdir()
    hidden.touch()
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for path in ("tests/test_golden.py", "tests/golden/losses/io.npz", "docs/index.md", "Makefile", "CITATION.cff"):
        assert (unpacked / path).is_file(), path
    assert not list(unpacked.rglob(hidden.name)) and not list(unpacked.rglob("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, archive]
    subprocess.run([*pip, *build], check=True)
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, *tmp_path.glob("*.whl")], check=True)
    assert (target / "diffusers_adm" / "py.typed").is_file()
    (metadata,) = target.glob("diffusers_adm-*.dist-info/METADATA")
    description = metadata.read_text()
    assert "## Three minutes" in description and "https://github.com/openai/guided-diffusion" in description
    assert "![" not in description and not re.search(r"\]\((?!https://)", description)
    tests = [sys.executable, "-m", "pytest", "-q", "tests/openai/test_flags.py"]
    subprocess.run(tests, cwd=unpacked, env={**os.environ, "PYTHONPATH": str(target)}, check=True, capture_output=True)
    printed = run_python(
        "import diffusers_adm\n"
        "pipe = diffusers_adm.ClassifierGuidedPipeline.from_pretrained(diffusers_adm.default_model())\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "image = pipe(class_labels='7', num_inference_steps=2).images[0]\n"
        "import diffusers_adm.training.train_unet, diffusers_adm.training.train_classifier\n"
        "import diffusers_adm.training.train_upsampler, diffusers_adm.evaluation\n"
        "print(diffusers_adm.__file__, diffusers_adm.default_model(), image.size)",
        PYTHONPATH=str(target),
    )
    package, model, size = printed.split(maxsplit=2)
    assert Path(package).is_relative_to(target) and Path(model).is_relative_to(target)
    assert size.strip() == "(32, 32)"


def test_import_needs_neither_training_nor_evaluation_packages():
    printed = run_python("import sys, diffusers_adm; print(*sys.modules)")
    assert not {"datasets", "torch_fidelity", "tensorboard", "matplotlib"} & set(printed.split())


def test_version_is_that_of_the_distribution():
    assert version("diffusers-adm") == diffusers_adm.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_adm.__version__


def test_command_line_says_what_it_can_do():
    printed = run_python("from diffusers_adm.cli import main; main(['--help'])")
    assert "convert" in printed and "demo" in printed


@pytest.mark.parametrize(("model", "megabytes"), [(default_model, 8), (default_photo_model, 20)])
def test_shipped_weights_are_small_half_precision_safetensors(model, megabytes):
    files = [path for path in Path(model()).rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {"unet", "classifier"}
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    pipeline = ClassifierGuidedPipeline.from_pretrained(model(), dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.classifier.dtype == torch.float16


def test_commands_take_shipped_models_by_name():
    expected = ClassifierGuidedPipeline.from_pretrained(default_photo_model())
    pipeline, classifier = load_pipeline("shipped:adm-cifar-32"), load_network("shipped:adm-cifar-32", "classifier")
    assert weights_digest(pipeline.components) == weights_digest(expected.components)
    assert weights_digest({"classifier": classifier}) == weights_digest({"classifier": expected.classifier})


@pytest.mark.parametrize(
    ("model", "judge", "steps", "condition_unet", "guidance_scale", "right"),
    [
        (default_model, load_digit_classifier, 25, True, 1.0, 29),
        (default_model, load_digit_classifier, 25, False, 10.0, 28),
        (default_photo_model, load_photo_classifier, 10, True, 1.0, 24),
        (default_photo_model, load_photo_classifier, 10, False, 10.0, 26),
    ],
)
def test_shipped_models_draw_the_classes_that_are_asked_for(
    model, judge, steps, condition_unet, guidance_scale, right
):
    pipeline = ClassifierGuidedPipeline.from_pretrained(model())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(30) % 10
    drawn = pipeline(
        class_labels=labels,
        guidance_scale=guidance_scale,
        condition_unet=condition_unet,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    with torch.no_grad():
        judged = judge()(drawn.clamp(-1, 1)).argmax(dim=1)
    assert (judged == labels).sum() >= right


@pytest.mark.parametrize(
    ("model", "megabytes", "judge", "steps", "right"),
    [
        (default_consistency_model, 4, load_digit_classifier, 1, 96),
        (default_consistency_model, 4, load_digit_classifier, 2, 96),
        (default_photo_consistency_model, 17, load_photo_classifier, 1, 84),
        (default_photo_consistency_model, 17, load_photo_classifier, 2, 88),
    ],
)
def test_consistency_models_draw_the_classes_that_are_asked_for(model, megabytes, judge, steps, right):
    files = [path for path in Path(model()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    pipeline = ClassifierGuidedPipeline.from_pretrained(model())
    assert pipeline.config.num_inference_steps == 2  # of a call without steps
    labels = torch.arange(100) % 10
    call = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    drawn = pipeline(class_labels=labels, **call).images
    with torch.no_grad():
        judged = judge()(drawn.clamp(-1, 1)).argmax(dim=1)
    assert (judged == labels).sum() >= right


def test_default_cascade_draws_the_digits_that_are_asked_for():
    files = [path for folder in default_cascade() for path in Path(folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    small, large = default_cascade()
    stages = [ClassifierGuidedPipeline.from_pretrained(small), ADMUpsamplePipeline.from_pretrained(large)]
    for stage in stages:
        stage.scheduler = DDIMScheduler.from_config(stage.scheduler.config)
        stage.set_progress_bar_config(disable=True)
    labels = torch.arange(30) % 10
    calls = [{"num_inference_steps": 25}, {"num_inference_steps": 10}]
    generator = torch.Generator().manual_seed(0)
    drawn = draw_cascade(stages, labels, calls, generator, output_type="latent").images.clamp(-1, 1)
    with torch.no_grad():
        judged = load_digit_classifier()(drawn).argmax(dim=1)
    assert (judged == labels).sum() >= 28


@pytest.mark.parametrize(("words", "rows", "size"), [([], 4, 64), (["--photos"], 4, 96), (["--cascade"], 2, 64)])
def test_demo_draws_a_labelled_grid(words, rows, size, tmp_path, capsys):
    assert run("demo", *words, "--steps", 2, "--output", tmp_path / "demo.png") == 0
    with Image.open(tmp_path / "demo.png") as grid:
        assert grid.width > 10 * size and rows * size < grid.height < (rows + 1) * size + 64
    assert str(tmp_path / "demo.png") in capsys.readouterr().out
