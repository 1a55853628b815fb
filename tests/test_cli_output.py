"""Commands whose output cannot be written: one line, and no partial file under a final name."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from digit_features import NAME as DIGITS
from golden_cases import draw_weights, load_case, published_flags
from image_files import digits_npz, random_images

from diffusers_adm.command_line import run_command


FEW = ("--batch_size", 3, "--num_inference_steps", 1)
COMMANDS = {
    "sample": ("sample", "--output", "new", "--num_samples", 6, *FEW),
    "evaluate": ("evaluate", "reference.npz", "drawn.npz", "--output", "new.json", "--feature_extractor", DIGITS),
    "make-reference": ("make-reference", "drawn.npz", "new.npz", "--feature_extractor", DIGITS),
    "nll": ("nll", "drawn.npz", "--output", "new", "--unconditional", "--timestep_respacing", 1),
    "sweep": ("sweep", "reference.npz", "--output", "new", "--num_samples", 4, *FEW, "--feature_extractor", DIGITS),
    "convert": ("convert", "--classifier", "model.pt", "--flags", "FLAGS", "--output", "new"),
    "demo": ("demo", "--output", "new.png", "--steps", 1),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Files that the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    digits_npz(folder / "drawn.npz", random_images(6))
    assert run("make-reference", folder / "drawn.npz", folder / "reference.npz", "--feature_extractor", DIGITS) == 0
    torch.save(draw_weights(load_case("classifier_spatial")[0]), folder / "model.pt")
    return folder


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch) -> Path:
    """The current folder, with the inputs."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_full_disk(command: Callable[[], int], most_bytes: int) -> int:
    """Runs a command where files cannot grow beyond some bytes, which Python reports as it reports a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, unlimited[1]))
    try:
        return command()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize(
    ("command", "most_bytes", "file"),
    [
        ("sample", 3000, "new/shards/000000.npz"),
        ("sample", 6000, "new/(grid.png|samples_.*npz)"),
        ("evaluate", 100, "new.json"),
        ("make-reference", 10_000, "new.npz"),
        ("nll", 10_000, "new/terms.png"),
        ("sweep", 100, "new/points/.*/settings.json"),
        ("convert", 4000, "new"),
        ("demo", 1000, "new.png"),
    ],
)
def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(command, most_bytes, file, folder, capsys):
    flags = published_flags(load_case("classifier_spatial")[0])
    words = [flags if word == "FLAGS" else word for word in COMMANDS[command]]
    assert with_full_disk(lambda: run(*words), most_bytes) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffusers-adm")]
    assert re.search(rf"[ /]{file}: .*File too large", line), line
    assert not list(folder.rglob("partial-*"))
    for path in folder.glob("new*"):
        assert path.is_dir() and not any(path.rglob("samples_*")), path
    assert run(*words) == 0  # with room again, the run goes on


def test_results_are_written_before_a_reader_that_has_gone_is_noticed(folder):
    """The reader ends early in `diffusers-adm evaluate ... | true`."""
    helpers = str(Path(__file__).parent / "helpers")
    script = f"import sys; sys.path.append({helpers!r}); import digit_features; from diffusers_adm.cli import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-c", script, *map(str, COMMANDS["evaluate"])]
    ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 2
    assert ended.stderr == "diffusers-adm evaluate: error: the program that reads the output has ended\n"
    assert json.loads((folder / "new.json").read_text())["metrics"]


@pytest.mark.parametrize("fails", [lambda: torch.empty(2**60), lambda: np.empty(2**50)], ids=["torch", "NumPy"])
def test_full_memory_ends_in_one_line(fails, capsys):
    assert run_command("diffusers-adm sample", fails) == 2
    assert capsys.readouterr().err == "diffusers-adm sample: error: the memory is full: choose a smaller batch size\n"


def test_an_interruption_ends_in_one_line(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert run_command("diffusers-adm sample", interrupt) == 130
    assert capsys.readouterr().err == "diffusers-adm sample: interrupted\n"


def test_errors_of_the_program_are_not_hidden():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        run_command("diffusers-adm sample", lambda: torch.ones(2, 3) @ torch.ones(2, 3))
