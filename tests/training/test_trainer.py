"""Loop over optimizer steps: it learns, accumulates, and stops before values that are not finite are saved."""

import json
import math
import os
import shutil
import signal
import time

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_models import draw_parameters
from training_runs import checkpoint_tensors, classifier_args, unet_args, upsampler_args, without_times

from diffusers_adm import NoisyClassifier
from diffusers_adm.losses import classifier_loss
from diffusers_adm.training import train_classifier, train_unet, train_upsampler
from diffusers_adm.training.checkpoint_folders import list_checkpoints
from diffusers_adm.training.checkpointing import find_checkpoint
from diffusers_adm.training.configuration import run_script
from diffusers_adm.training.metrics import read_metrics
from diffusers_adm.training.objective import LossTerms
from diffusers_adm.training.options import AverageOptions
from diffusers_adm.training.setup import load_training_images, model_config, set_up_accelerator
from diffusers_adm.training.trainer import Trainer


@pytest.mark.parametrize(
    ("script", "arguments", "more"),
    [
        (train_unet, unet_args, []),
        (train_unet, unet_args, ["--gradient_accumulation_steps", "2"]),
        (train_upsampler, upsampler_args, ["--validation_fraction", "0.15"]),
        (train_upsampler, upsampler_args, ["--streaming", "--dataloader_num_workers", "1"]),
        (train_classifier, classifier_args, []),
    ],
    ids=["unet", "unet-accumulating", "upsampler", "upsampler-streaming", "classifier"],
)
def test_six_steps_equal_three_and_three_more(script, arguments, more, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # seconds, at the end of each pass
    # 14 images make three batches of four an epoch: step six lies in the second epoch, or with accumulation the fourth.
    options = ["--lr_scheduler", "constant", "--validation_steps", "3", *more]
    script.main(arguments(dataset, tmp_path / "whole", 6, *options))
    script.main(arguments(dataset, tmp_path / "parts", 3, *options))
    torch.manual_seed(123)
    script.main(arguments(dataset, tmp_path / "parts", 6, *options, "--resume_from_checkpoint", "latest"))
    whole, parts = (checkpoint_tensors(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and whole
    for name in whole:
        for key, tensor in whole[name].items():
            assert torch.equal(tensor, parts[name][key]), (name, key)


def test_classifier_learns_and_reports_accuracy_by_noise(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 60, "--lr_scheduler", "constant"))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["validation_accuracy_quarter_0"] == 1.0
    assert 0.5 < metrics[-1]["validation_accuracy"] <= 1.0 and metrics[-1]["validation_accuracy_top5"] == 1.0
    assert 0 < metrics[-1]["validation_loss"] < 0.7
    quarters = [value for name, value in metrics[-1].items() if name.startswith("validation_loss_quarter_")]
    assert min(quarters) < metrics[-1]["validation_loss"] < max(quarters)
    assert 0 <= metrics[-1]["validation_calibration_error"] <= 1
    card = (tmp_path / "classifier" / "README.md").read_text()
    assert "accuracy on held-out images, all timesteps" in card and "| validation_loss |" in card
    assert metrics[0]["loss"] > metrics[-2]["loss"]


def test_accumulation_goes_on_across_the_end_of_an_epoch(dataset, tmp_path):
    # Three batches an epoch: the second of three steps takes the last of one epoch and the first of the next.
    train_classifier.main(classifier_args(dataset, tmp_path, 3, "--gradient_accumulation_steps", "2"))
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state == {
        "global_step": 3,
        "epoch": 1,
        "images_into_epoch": 12,
        "num_processes": 1,
        "num_images": 14,
        "averaged_steps": 3,
        "class_names": ["left", "right"],
    }


def test_epochs_are_as_many_steps_as_they_hold_batches(dataset, tmp_path):
    more = ["--num_epochs", "2", "--gradient_accumulation_steps", "3"]
    train_classifier.main(classifier_args(dataset, tmp_path, 99, *more))
    # 14 images make three batches of four; two passes make six, and three batches make a step.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="--num_epochs"):
        train_classifier.main(classifier_args(dataset, tmp_path / "stream", 9, "--num_epochs", "1", "--streaming"))
    few = ["--num_epochs", "1", "--gradient_accumulation_steps", "4"]
    with pytest.raises(ValueError, match="--num_epochs 1 has only 3 batches, but a step takes 4"):
        train_classifier.main(classifier_args(dataset, tmp_path / "few", 9, *few))


def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 3, "--logging_steps", "100"))
    resume = ["--resume_from_checkpoint", "latest", "--logging_steps", "100"]
    with pytest.raises(RuntimeError, match=r"not finite.*checkpoint-3"):
        train_classifier.main(classifier_args(dataset, tmp_path, 12, *resume, "--learning_rate", "1e30"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("steps", ["--checkpointing_steps 1", "--validation_steps 1"])
def test_weights_that_are_not_finite_are_not_saved(steps, dataset, tmp_path):
    # Gradients of zero, which layers of zeros have, over their root mean square: the loss is still finite.
    more = ["--adam_epsilon", "0", "--logging_steps", "100", *steps.split()]
    with pytest.raises(RuntimeError, match="a weight is not finite before step 1.*no checkpoint yet"):
        train_unet.main(unet_args(dataset, tmp_path, 2, *more))
    assert not list(tmp_path.glob("*checkpoint-*")) and not list(tmp_path.glob("*pipeline*"))


def test_speed_counts_neither_validating_nor_saving(small_run):
    trainer = small_run(4, "--logging_steps", "4", "--validation_steps", "1", "--checkpointing_steps", "1")
    began = time.monotonic()
    trainer.train(label_loss, [lambda trainer: time.sleep(0.5)])
    (entry,) = [entry for entry in read_metrics(trainer.metrics_file) if "images_per_second" in entry]
    assert 16 / entry["images_per_second"] < time.monotonic() - began - 2


def test_second_ctrl_c_ends_at_once(small_run, capfd):
    trainer, seen, before = small_run(9), [], signal.getsignal(signal.SIGINT)

    def objective(model, batch):
        for _ in range(2):
            seen.append(trainer.stop.received)
            os.kill(os.getpid(), signal.SIGINT)
        return label_loss(model, batch)

    with pytest.raises(SystemExit, match="130"):
        run_script(lambda _: trainer.train(objective), lambda: None)
    assert seen == [False, True] and trainer.global_step == 0
    error = capfd.readouterr().err
    assert "Press Ctrl-C again to end at once" in error and "error: interrupted" in error
    assert signal.getsignal(signal.SIGINT) is before


def test_first_validation_follows_a_checkpoint(small_run):
    # A run that is killed after its first validation, but before its first saving step, can go on.
    trainer, before = small_run(4, "--validation_steps", "2", "--checkpointing_steps", "100"), []
    folder = trainer.options.output.output_dir
    trainer.train(label_loss, [lambda trainer: before.append([path.name for path in list_checkpoints(folder)])])
    assert before == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]


@pytest.mark.parametrize("lost", [[], ["validated"], ["validated", "metrics.jsonl"]], ids=len)
def test_end_that_was_reached_before_adds_only_what_is_lost(lost, dataset, tmp_path):
    options = classifier_args(dataset, tmp_path, 3, "--resume_from_checkpoint", "latest")
    train_classifier.main(options)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [list(entry)[1] for entry in entries] == ["loss", "loss", "loss", "validation_loss"]
    if "validated" in lost:  # killed between validating and noting it
        (tmp_path / "checkpoint-3" / "validated").unlink()
    if "metrics.jsonl" in lost:  # or before its line was written
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries[:-1]))
    shutil.rmtree(tmp_path / "classifier")
    train_classifier.main(options)
    assert without_times(read_metrics(tmp_path / "metrics.jsonl")) == without_times(entries)
    assert (tmp_path / "classifier").exists()


@pytest.fixture
def small_run(dataset, tmp_path):
    """Makes the trainer of a classifier."""

    def build(steps, *more):
        options = classifier_args(dataset, tmp_path, steps, *more)
        accelerator = set_up_accelerator(options)
        images, _ = load_training_images(options)
        config = model_config(options.architecture, options.format)
        return Trainer(options, accelerator, draw_parameters(NoisyClassifier(num_classes=2, **config)).train(), images)

    return build


def label_loss(model, batch):
    """Objective of a classifier at a timestep of little noise."""
    timestep = torch.full_like(batch["label"], 10)
    return LossTerms(classifier_loss(model(batch["image"], timestep).logits, batch["label"]), {}, timestep)


@pytest.fixture
def overflowing_run(dataset, tmp_path, monkeypatch):
    """Builds the trainer of a run in fp16 as accelerate sets it up on a GPU. On a CPU, accelerate refuses to."""

    def build(init_scale, *more):
        options = unet_args(dataset, tmp_path, 8, "--lr_scheduler", "linear", *more)
        accelerator = set_up_accelerator(options)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=init_scale)
        images, _ = load_training_images(options)
        model = draw_parameters(
            NoisyClassifier(num_classes=2, **model_config(options.architecture, options.format))
        ).train()
        checkpoint = find_checkpoint(options.output, accelerator)
        return Trainer(options, accelerator, model, images, AverageOptions(ema_decay=(0.5,)), checkpoint=checkpoint)

    return build


def test_step_that_overflows_changes_nothing(overflowing_run, tmp_path):
    # Gradients overflow at the first scales, and each overflow halves the scale.
    trainer = overflowing_run(2.0**22)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    seen = []

    def watch(model, batch):
        unchanged = all(map(torch.equal, before, model.parameters()))
        average = all(map(torch.equal, before, trainer.averages[0.5].shadow_params))
        seen.append((unchanged, average, trainer.lr_scheduler.get_last_lr()[0]))
        return label_loss(model, batch)

    trainer.train(watch)
    skipped = sum(unchanged for unchanged, *_ in seen) - 1
    assert 0 < skipped < 7
    assert all(step == (True, True, 1e-3) for step in seen[: skipped + 1])
    assert all(step[:2] == (False, False) and step[2] < 1e-3 for step in seen[skipped + 1 :])
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["loss_scale"] == 2.0**21 and entries[-1]["loss_scale"] <= 2.0 ** (22 - skipped)
    assert all(math.isfinite(entry["grad_norm"]) for entry in entries)


def test_overflow_that_does_not_end_stops_the_run(overflowing_run):
    trainer = overflowing_run(2.0**60, "--max_skipped_steps", "2")
    with pytest.raises(RuntimeError, match="2 steps in a row overflowed fp16.*bf16.*no checkpoint yet"):
        trainer.train(label_loss)
