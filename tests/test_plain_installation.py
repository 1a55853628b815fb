"""The package without extras: sampling works, and commands that require an extra say how to install it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT


# Import names of what the extras add to a plain installation.
EXTRAS = {
    "datasets",
    "gradio",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "pytest",
    "tensorboard",
    "torch_fidelity",
    "transformers",
    "xdist",
}
SAMPLE = "sample --output run --num_samples 3 --batch_size 2 --num_inference_steps 2 --scheduler DDIM"
# Commands that need more, and their extras.
OTHERS = {
    "evaluate a.npz b.npz": "train,eval",
    "sweep a.npz --output c": "train,eval",
    "ablate a.npz --table 1 --output e --max_train_steps 1": "train,eval",
    "make-reference a b.npz": "train,eval",
    "nll a --output b": "train,eval",
    "inspect-data --dataset_name a": "train,eval",
    "export --output d": "export",
    "page --port 7860": "page",
}
SCRIPT = f"""
from diffusers_adm.cli import main
from diffusers_adm.command_line import describe_missing_package
from diffusers_adm.training.pretrained import add_adapter

assert main({SAMPLE!r}.split()) == 0
for words in {list(OTHERS)!r}:
    assert main(words.split()) == 2, words
try:
    add_adapter(None, rank=8)
except ModuleNotFoundError as error:
    print(describe_missing_package(error))
"""


def plain_installation(folder: Path) -> Path:
    """Fills a folder to import from, with this package and all installed packages except those of the extras."""
    installed = {path.name: path for place in sys.path if "site-packages" in place for path in Path(place).iterdir()}
    for name, path in installed.items():
        if name.partition(".")[0] not in EXTRAS and "diffusers_adm" not in name:
            (folder / name).symlink_to(path)
    package = folder / "diffusers_adm"
    package.mkdir()
    for path in (*(ROOT / "diffusers_adm").iterdir(), *map(ROOT.joinpath, ("pipelines", "training", "model_cards"))):
        (package / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_installation(tmp_path_factory.mktemp("plain"))


def run_python(plain: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(plain), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train_unet", "train_classifier", "train_upsampler", "train_consistency"])
def test_training_scripts_say_what_they_need_in_one_line(script, plain, tmp_path):
    words = "--train_data_dir images --output_dir run --max_train_steps 1".split()
    run = run_python(plain, tmp_path, "-m", f"diffusers_adm.training.{script}", *words)
    assert run.returncode != 0 and not run.stdout
    assert run.stderr.startswith("error: the package datasets is not installed: run pip install -e"), run.stderr
    assert run.stderr.count("\n") == 1


def test_a_plain_installation_draws_and_says_what_the_rest_needs(plain, tmp_path):
    run = run_python(plain, tmp_path, "-c", SCRIPT)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "samples_3x32x32x1.npz").is_file()
    errors = [line for line in run.stderr.splitlines() if "error" in line]
    assert len(errors) == len(OTHERS), run.stderr
    for line, (words, extra) in zip(errors, OTHERS.items()):
        assert line.startswith(f"diffusers-adm {words.split()[0]}: error: the package ")
        assert f'run pip install -e ".[{extra}]" in a checkout' in line
    assert 'the package peft is not installed: run pip install -e ".[lora]" in a checkout' in run.stdout
