"""Ablations: interrupted ones end like undisturbed ones, and what cannot be run is refused before the first training."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import run
from digit_features import NAME as DIGITS
from image_files import digits_npz, random_images
from PIL import Image
from training_runs import save_bars

from diffusers_adm.ablation.command import load_evaluator
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.training import train_unet


HELPERS = Path(__file__).parents[1] / "helpers"
TRAINING = (
    "--dataset_name bars --validation_split train --resolution 32 --in_channels 1 --crop pad --no-random_flip --model_channels 8"
    " --channel_mult 1,1,1 --layers_per_block 1 --attention_resolutions 8 --norm_num_groups 4 --attention_head_dim 4"
    " --noise_schedule cosine --num_train_timesteps 5 --train_batch_size 2 --ema_decay 0.5 --learning_rate 1e-3"
    " --max_train_steps 4 --checkpointing_steps 2 --validation_steps 4 --logging_steps 2 --num_validation_images 1"
).split()
SAMPLING = "--scheduler DDIM --num_inference_steps 2 --num_samples 6 --batch_size 3".split()
ABLATE = ("ablate", "reference.npz", "--feature_extractor", DIGITS, *SAMPLING, *TRAINING, "--output", "new")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A dataset, a reference, and files of variants."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bars").mkdir()
    save_bars(folder / "bars")
    digits_npz(folder / "reference.npz", random_images(20))
    digits_npz(folder / "colour.npz", random_images(20, channels=3))
    for name, text in {
        "ablate.py": f"import sys; sys.path.append({str(HELPERS)!r}); import digit_features; from diffusers_adm.cli import main;"
        " sys.exit(main())",
        "two.yaml": "narrow: {}\nwide: {model_channels: 12, learning_rate: 1e-4}",
        "one.yaml": "narrow: {}",
        "list.json": '["narrow", "wide"]',
        "path.yaml": "narrow: {}\n../wide: {}",
        "number.yaml": "narrow: {}\nwide: 12",
        "unknown.yaml": "narrow: {}\nwide: {model_chanels: 12}",
        "steps.yaml": "narrow: {}\nlong: {max_train_steps: 12}",
        "data.yaml": "narrow: {}\nother: {dataset_name: bars}",
        "groups.yaml": "narrow: {}\nwide: {model_channels: 9}",
        "adapter.yaml": "narrow: {}\nadapted: {lora_rank: 2}",
        "missing.yaml": "narrow: {}\ntuned: {pretrained_model_name_or_path: no/such/model}",
        "failing.yaml": "failing: {learning_rate: 1.0e+30}\nlarge: {model_channels: 4000000}\nnarrow: {}",
    }.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def folder(inputs, tmp_path, monkeypatch) -> Path:
    """The current folder, with the inputs."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wait_for(path: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process is None or process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def interrupt_at(path: Path) -> None:
    """Presses Ctrl-C once a file exists."""

    def press() -> None:
        wait_for(path)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def results_of(folder: Path) -> dict:
    """Results without times and paths, which differ between equal ablations."""
    results = json.loads((folder / "results.json").read_text())
    results["settings"]["samples"].pop("name")
    for variant in results["variants"]:
        variant["spread"].pop("train_seconds")
        for entry in variant["runs"]:
            assert entry["metrics"].pop("train_seconds") > 0
    return results


def test_a_run_that_fails_or_fills_the_memory_does_not_stop_the_others(folder, capsys):
    words = [*ABLATE, "--variants", "failing.yaml", "--seeds", 0]
    for _ in range(2):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert "2 of 3 runs failed: failing with seed 0, large with seed 0. All others are in new" in error
    (row,) = results_of(folder / "new")["variants"]
    assert row["variant"] == "narrow" and row["spread"]["frechet_distance"]["mean"] > 0


def test_reference_is_not_taken_from_the_training_images(folder):
    for name, images in (("trained", random_images(5)), ("reference", random_images(7))):
        (folder / name).mkdir()
        for number, pixels in enumerate(images):
            Image.fromarray(pixels[:, :, 0]).save(folder / name / f"{number}.png")
    options = [*TRAINING[2:], "--no-class_conditional", "--train_data_dir", "trained", "--output_dir", "new"]
    evaluator = load_evaluator("reference", FeatureOptions(feature_extractor=DIGITS), train_unet.parse_args(options))
    assert evaluator.reference.num_images == 7


@pytest.mark.slow
def test_two_processes_share_an_ablation(folder, capsys):
    words = [*ABLATE, "--variants", "two.yaml", "--seeds", "0"]
    two = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 ablate.py".split()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*two, *map(str, words)], check=True, env=environment)
    assert [row["variant"] for row in results_of(folder / "new")["variants"]] == ["narrow", "wide"]
    assert run(*words) == 2
    assert "new/narrow/seed-0 was begun by 2 processes" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_ablation_ends_like_an_undisturbed_one(folder, capsys):
    words = [*ABLATE[:-1], "killed", "--variants", "two.yaml", "--seeds", "0,1"]
    process = subprocess.Popen([sys.executable, folder / "ablate.py", *words], stdout=subprocess.DEVNULL)
    wait_for(folder / "killed/wide/seed-0/checkpoint-2", process)
    process.kill()
    process.wait()
    assert not (folder / "killed/wide/seed-1").exists()
    finished = folder / "killed/narrow/seed-0/checkpoint-4/model.safetensors"
    trained_at = finished.stat().st_mtime_ns
    interrupt_at(folder / "killed/narrow/seed-1/checkpoint-2")
    assert run(*words) == 130
    assert run(*words) == 0
    assert finished.stat().st_mtime_ns == trained_at
    fewer = folder / "fewer"
    fewer.mkdir()
    save_bars(fewer, 12)
    assert run(*words, "--dataset_name", "fewer") == 2
    assert "killed/narrow/seed-0 was begun with 14 images" in capsys.readouterr().err
    assert run(*words, "--pretrained_model_name_or_path", "shipped:adm-mnist-32", "--model_channels", "8") == 2
    assert "--pretrained_model_name_or_path shipped:adm-mnist-32 (was None)" in capsys.readouterr().err
    assert run(*words, "--learning_rate", "0.5") == 2
    assert (
        "killed/narrow/seed-0 was begun with other options: --learning_rate 0.5 (was 0.001)" in capsys.readouterr().err
    )

    assert run(*words[: words.index("killed")], "whole", "--variants", "two.yaml", "--seeds", "0,1") == 0
    results = results_of(folder / "whole")
    assert results_of(folder / "killed") == results
    narrow, wide = results["variants"]
    assert [entry["seed"] for entry in wide["runs"]] == [0, 1]
    distances = [entry["metrics"]["frechet_distance"] for entry in wide["runs"]]
    assert wide["spread"]["frechet_distance"]["mean"] == pytest.approx(sum(distances) / 2)
    assert wide["spread"]["frechet_distance"]["std"] == pytest.approx(abs(distances[0] - distances[1]) / 2**0.5)
    for change, metric in (("change", "frechet_distance"), ("loss_change", "validation_loss")):
        assert narrow["spread"][change] == {"mean": 0, "std": 0} != wide["spread"][change]
        mean = wide["spread"][metric]["mean"] - narrow["spread"][metric]["mean"]
        assert wide["spread"][change]["mean"] == pytest.approx(mean)
    assert wide["parameters"] > narrow["parameters"] and wide["macs"] > narrow["macs"]
    assert [step for step, _ in wide["runs"][0]["loss_curve"]] == [4]
    with open(folder / "whole" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seeds"]) for row in rows] == [("narrow", "2"), ("wide", "2")]
    assert float(rows[1]["held-out loss"]) == wide["spread"]["validation_loss"]["mean"]
    assert "4 steps of 2 images" in (folder / "whole" / "results.md").read_text()
    with Image.open(folder / "whole" / "ablation.png") as plot:
        assert plot.width > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variants", "two.yaml", "--table", 1), "Exactly one of --table and --variants is required"),
        ((), "Exactly one of --table and --variants is required"),
        (("--table", 4), "argument --table: invalid choice: '4'"),
        (("--table", 1), "--attention_resolutions is set by the rows of --table 1. Leave it out"),
        (("--variants", "none.yaml"), "--variants must be a file, but there is no file none.yaml"),
        (("--variants", "one.yaml"), "--variants one.yaml must have at least 2 variants, but has 1"),
        (("--variants", "list.json"), "--variants list.json is not a table of options and values"),
        (("--variants", "path.yaml"), "names must be .*, but got '../wide'"),
        (("--variants", "number.yaml"), "wide must be a table of options, {} for none, but got 12"),
        (("--variants", "unknown.yaml"), "wide has an unknown option 'model_chanels': did you mean model_channels?"),
        (("--variants", "steps.yaml"), "long changes max_train_steps, which must be equal for all variants"),
        (("--variants", "data.yaml"), "other changes dataset_name, which must be equal for all variants"),
        (("--variants", "groups.yaml"), "Variant wide: `norm_num_groups` must divide the channels"),
        (("--variants", "two.yaml", "--seeds", "0,0"), "--seeds 0,0 must be different numbers"),
        (("--variants", "two.yaml", "--cfg_weight", 1), "Variant narrow: .* requires a UNet with a null class"),
        (("--variants", "two.yaml", "--guidance_scale", 1), "Variant narrow: `guidance_scale` requires a classifier"),
        (("--variants", "adapter.yaml"), "Variant adapted: --lora_rank requires --pretrained_model_name_or_path"),
        (("--variants", "missing.yaml"), "Variant tuned: There is no folder 'no/such/model'"),
        (("--variants", "two.yaml", "--eta", 2), r"Variant narrow: `eta` must be a number in \[0, 1\]"),
        (("--variants", "two.yaml", "--labels", "none.txt"), "Variant narrow: .*none.txt"),
        (("--variants", "two.yaml", "--total_batch_size", 3), "--total_batch_size must be a multiple of 2"),
        (("--variants", "two.yaml", "--label_column", "none"), "--label_column must be one of the other columns"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(words, message, folder, capsys):
    assert run(*ABLATE, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.search(message, lines[-1]), lines
    assert not (folder / "new").exists()


def test_length_is_required(folder, capsys):
    length = ABLATE.index("--max_train_steps")
    words = (*ABLATE[:length], *ABLATE[length + 2 :])
    assert run(*words, "--variants", "two.yaml") == 2
    assert capsys.readouterr().err.startswith("diffusers-adm ablate: error: one of --max_train_steps")


def test_reference_must_have_the_channels_of_the_training_images(folder, capsys):
    assert run("ablate", "colour.npz", *ABLATE[2:], "--variants", "two.yaml") == 2
    assert "must have the size and channels of the reference, 32x32 pixels in colour" in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_epochs_are_those_of_the_whole_batch(folder, capsys):
    steps = []
    for more in ((), ("--total_batch_size", 8)):
        words = [*ABLATE, "--variants", "two.yaml", "--dry_run", "--num_epochs", 8, *more]
        assert run(*words) == 0
        steps.append(int(re.search(r"(\d+) steps", capsys.readouterr().out)[1]))
    assert steps[0] == 4 * steps[1]


def test_dry_run_prints_costs_and_writes_nothing(folder, capsys):
    own = ABLATE.index("--attention_resolutions"), ABLATE.index("--attention_head_dim")
    table = [word for place, word in enumerate(ABLATE) if place not in own and place - 1 not in own]
    assert run(*table, "--table", "adagn", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["variant", "adagn", "addition", "All"]
    assert "6 runs take about" in lines[-1] and "4 steps of 2 images" in lines[-1]
    assert not (folder / "new").exists()
