"""Messages of a training at its start, in the log, in the tracker, and at its end."""

import json
import re
import time

import pytest
import torch
from command_line import parser_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import classifier_args, unet_args

from diffusers_adm.training import train_classifier, train_consistency, train_unet, train_upsampler
from diffusers_adm.training.configuration import run_script


REQUIRED = ["--output_dir", "out", "--train_data_dir", "images"]


def test_training_says_what_it_trains_how_far_it_is_and_where_the_results_are(dataset, tmp_path, capsys):
    run = unet_args(
        dataset, tmp_path, 2, *"--num_train_timesteps 25 --validation_steps 1 --report_to tensorboard".split()
    )
    train_unet.main(run)
    out = capsys.readouterr().out
    assert re.search(
        r"Training ADMUNet2DModel \(0.0\d million parameters\) on 14 images of 2 classes: 2 steps of 4 images, 0.6 passes"
        r" over the data, on 1 x CPU, precision no.",
        out,
    )
    assert re.search(r"step 1 of 2, 0:00:\d\d elapsed, 0:00:\d\d left: loss \d", out)
    for name, path in (("model", "pipeline"), ("model card", "pipeline/README.md"), ("metrics", "metrics.jsonl")):
        assert re.search(rf"^{name}: +{tmp_path / path}$", out, re.MULTILINE)
    assert f"diffusers-adm sample --model {tmp_path / 'pipeline'}" in out
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times) and time.time() - 60 < times[0] <= time.time()
    assert "| time |" not in (tmp_path / "pipeline" / "README.md").read_text()
    events = EventAccumulator(str(tmp_path / "diffusers-adm")).Reload()
    (first, last) = events.Images("samples")
    # Four images of 16 pixels with gaps of 2, twice, and a margin of 8 pixels.
    assert (first.step, last.step) == (1, 2) and (last.width, last.height) == (2 * 70 + 8, 16)


def test_classifier_says_how_to_use_it(dataset, tmp_path, capsys):
    train_classifier.main(classifier_args(dataset, tmp_path, 1))
    out = capsys.readouterr().out
    assert f'NoisyClassifier.from_pretrained("{tmp_path / "classifier"}")' in out and "pictures" not in out


def test_full_memory_is_an_error_in_one_line():
    def main(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(SystemExit, match="^error: the memory is full. Pass a smaller --train_batch_size"):
        run_script(main, lambda: None)


def test_misspelt_option_names_the_nearest(capsys, tmp_path):
    with pytest.raises(SystemExit):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", "--lerning_rate=1"])
    assert "there is no option --lerning_rate: did you mean --learning_rate?" in capsys.readouterr().err
    (tmp_path / "options.yaml").write_text("lerning_rate: 1")
    with pytest.raises(ValueError, match="no option 'lerning_rate': did you mean learning_rate"):
        train_unet.parse_args([*REQUIRED, "--config", str(tmp_path / "options.yaml")])


SCRIPTS = (train_unet, train_classifier, train_upsampler, train_consistency)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_names_type_and_default_of_every_option(script):
    parser = parser_of(script.parse_args, [])
    actions = [action for action in parser._actions if action.dest != "help"]
    for action in actions:
        assert "Default" in action.help or "required" in action.help.lower(), action.dest
        assert action.nargs == 0 or action.metavar or action.choices, action.dest
    assert parser.epilog.count("python -m diffusers_adm.training.") == 2


def test_steps_or_passes_are_required(capsys):
    with pytest.raises(SystemExit):
        train_unet.parse_args(REQUIRED)
    assert "one of --max_train_steps and --num_epochs is required" in capsys.readouterr().err
