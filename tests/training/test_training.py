"""The training scripts: they learn, resume exactly where they stopped, and leave models that load."""

import json
import math
import os
import random
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from tiny_models import draw_parameters
from torch.utils.data import DataLoader

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.data.images import center_crop, fit_image, random_crop, to_tensor
from diffusers_adm.losses import classifier_loss
from diffusers_adm.training import train_classifier, train_unet, train_upsampler
from diffusers_adm.training.denoising import label_conditions
from diffusers_adm.training.metrics import read_metrics
from diffusers_adm.training.objective import DenoisingObjective, LossTerms, build_noise_scheduler
from diffusers_adm.training.options import AverageOptions
from diffusers_adm.training.setup import build_unet, load_training_images, model_config, set_up_accelerator
from diffusers_adm.training.trainer import Trainer


ARCHITECTURE = (
    "--resolution 16 --in_channels 1 --crop pad --no-random_flip --model_channels 8 --channel_mult 1,2"
    " --layers_per_block 1 --attention_resolutions 8 --attention_head_dim 8 --norm_num_groups 4"
    " --noise_schedule cosine --train_batch_size 4 --logging_steps 1 --checkpointing_steps 3 --learning_rate 1e-3"
).split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with a parquet file of 14 images of 12x12 pixels: white on the left (class "left") or on the right."""
    folder = tmp_path_factory.mktemp("bars")
    images, labels = [], [i % 2 for i in range(14)]
    for label in labels:
        pixels = np.zeros((12, 12), dtype=np.uint8)
        pixels[:, 6 * label : 6 * label + 6] = 255
        images.append(PILImage.fromarray(pixels))
    features = Features({"image": Image(), "label": ClassLabel(names=["left", "right"])})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")
    return folder


def unet_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --ema_decay 0.5"
    return train_unet.parse_args(
        [*options.split(), *ARCHITECTURE, *"--label_dropout 0.3 --num_validation_images 4".split(), *more]
    )


def upsampler_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --ema_decay 0.5"
    return train_upsampler.parse_args(
        [
            *options.split(),
            *ARCHITECTURE,
            *"--low_resolution 4 --low_res_noise 0.2 --num_validation_images 3".split(),
            *more,
        ]
    )


def classifier_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --validation_split train"
    return train_classifier.parse_args([*options.split(), *ARCHITECTURE, *more])


def checkpoint_tensors(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


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
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds, at the end of each pass
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


def test_trained_pipeline_loads_with_its_class_names(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path / "unet", 3))
    train_classifier.main(classifier_args(dataset, tmp_path / "classifier", 3))
    classifier = NoisyClassifier.from_pretrained(tmp_path / "classifier" / "classifier")
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "unet" / "pipeline", classifier=classifier)
    pipeline.save_pretrained(tmp_path / "both")
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "both")
    images = pipeline(["left", "right"], num_inference_steps=2, guidance_scale=2.0).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert (tmp_path / "unet" / "samples" / "step-3.png").exists()


def test_published_unet_is_the_average_not_the_raw_weights(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    checkpoint = checkpoint_tensors(tmp_path / "checkpoint-3")
    published = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(published[key], tensor) for key, tensor in checkpoint["ema-0.5.safetensors"].items())
    assert any(not torch.equal(published[key], tensor) for key, tensor in checkpoint["model.safetensors"].items())


def test_losses_on_held_out_images_are_those_of_the_average(dataset, tmp_path):
    # More than half of the labels are dropped, and timesteps in training are not drawn evenly.
    more = ["--validation_split", "train", "--label_dropout", "0.6", "--schedule_sampler", "loss-second-moment"]
    options = unet_args(dataset, tmp_path / "often", 3, "--validation_steps", "1", *more)
    train_unet.main(options)
    logged = [entry for entry in read_metrics(tmp_path / "often" / "metrics.jsonl") if "validation_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert len({entry["validation_simple"] for entry in logged}) == 3

    # Measuring changes nothing of the training.
    train_unet.main(unet_args(dataset, tmp_path / "once", 3, *more))
    often, once = (checkpoint_tensors(tmp_path / name / "checkpoint-3") for name in ("often", "once"))
    assert all(torch.equal(often[name][key], once[name][key]) for name in often for key in often[name])

    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "often" / "pipeline")
    objective = DenoisingObjective(
        options.objective,
        build_noise_scheduler(options.diffusion),
        set_up_accelerator(options),
        lambda batch: label_conditions(options.classes, pipeline.unet, batch),
    )
    _, held_out = load_training_images(options)
    losses = []
    torch.manual_seed(options.optimisation.seed)
    with torch.no_grad():
        for batch in DataLoader(held_out, batch_size=4, generator=torch.Generator()):
            timestep = torch.randint(1000, batch["image"].shape[:1])
            losses.append(objective.terms(pipeline.unet, batch, timestep).logged["simple"])
    assert logged[-1]["validation_simple"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_classifier_learns_and_reports_accuracy_by_noise(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 60, "--lr_scheduler", "constant"))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["validation_accuracy_quarter_0"] == 1.0
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
    }


def test_training_starts_from_a_saved_model(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path / "first", 3))
    saved = tmp_path / "first" / "classifier"
    options = ["--learning_rate", "0", "--adam_weight_decay", "0", "--pretrained_model_name_or_path", str(saved)]
    train_classifier.main(classifier_args(dataset, tmp_path / "second", 1, *options))
    before, after = (checkpoint_tensors(tmp_path / name / "classifier") for name in ("first", "second"))
    for key, tensor in before["diffusion_pytorch_model.safetensors"].items():
        assert torch.equal(tensor, after["diffusion_pytorch_model.safetensors"][key])
    with pytest.raises(ValueError, match="layers_per_block 1 instead of 2"):
        train_classifier.main(classifier_args(dataset, tmp_path / "third", 1, *options, "--layers_per_block", "2"))


def test_training_starts_from_a_model_of_other_classes(dataset, tmp_path, caplog):
    def saved(name, **changes):
        options = unet_args(dataset, tmp_path, 1)
        options.classes.label_dropout = changes.pop("label_dropout", 0.3)
        unet = draw_parameters(build_unet(options, **changes))
        ClassifierGuidedPipeline(unet, build_noise_scheduler(options.diffusion)).save_pretrained(tmp_path / name)
        return unet.state_dict()

    frozen = ["--learning_rate", "0", "--pretrained_subfolder", "unet", "--pretrained_model_name_or_path"]
    seven = saved("seven", num_classes=7)
    train_unet.main(unet_args(dataset, tmp_path / "two", 1, *frozen, str(tmp_path / "seven")))
    trained = load_file(tmp_path / "two" / "checkpoint-1" / "model.safetensors")
    assert trained.pop("class_embedding.weight").shape[0] == 3
    assert all(torch.equal(tensor, seven[key]) for key, tensor in trained.items())
    assert "class_embedding.weight begin with random weights: num_class_embeds 2 instead of 7" in caplog.text

    conditional = saved("conditional", num_classes=2, label_dropout=0.0)
    train_unet.main(unet_args(dataset, tmp_path / "null", 1, *frozen, str(tmp_path / "conditional")))
    trained = load_file(tmp_path / "null" / "checkpoint-1" / "model.safetensors")
    assert torch.equal(trained["class_embedding.weight"][:2], conditional["class_embedding.weight"])


def test_used_output_folder_is_not_written_over(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 3))
    with pytest.raises(ValueError, match="resume_from_checkpoint latest"):
        train_classifier.main(classifier_args(dataset, tmp_path, 3))


def test_old_checkpoints_are_removed_only_up_to_the_limit(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 9, "--checkpoints_total_limit", "2"))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-6", "checkpoint-9"]


def test_launcher_runs_the_script_as_the_readme_says(dataset, tmp_path):
    script = train_unet.__file__
    options = f"--dataset_name {dataset} --output_dir {tmp_path} --max_train_steps 2 --ema_decay 0.5"
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", script, *options.split(), *ARCHITECTURE],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_resumed_run_must_be_the_same_run(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"--dropout 0.1 \(was 0.0\), --seed 1 \(was 0\)"):
        train_unet.main(unet_args(dataset, tmp_path, 6, *resume, "--seed", "1", "--dropout", "0.1"))
    # A learning rate may change, and does.
    train_unet.main(unet_args(dataset, tmp_path, 4, *resume, "--learning_rate", "1e-4"))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["learning_rate"] for entry in entries] == [1e-3, 1e-3, 1e-3, 1e-4]


def test_steps_that_are_taken_again_are_logged_once(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 5))
    shutil.rmtree(tmp_path / "checkpoint-5")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]


def test_incomplete_checkpoint_is_refused(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    (tmp_path / "checkpoint-3" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match="optimizer.bin missing"):
        train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))


def test_what_a_killed_run_left_half_replaced_is_no_hindrance(dataset, tmp_path):
    for name in ("old-pipeline", "old-checkpoint-3", "partial-checkpoint-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "checkpoint-3-copy").mkdir()
    train_unet.main(unet_args(dataset, tmp_path, 3))
    train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))
    assert not list(tmp_path.glob("old-*")) and not list(tmp_path.glob("partial-*"))
    assert (tmp_path / "checkpoint-3-copy").exists()


def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 3, "--logging_steps", "100"))
    resume = ["--resume_from_checkpoint", "latest", "--logging_steps", "100"]
    with pytest.raises(RuntimeError, match=r"not finite.*checkpoint-3"):
        train_classifier.main(classifier_args(dataset, tmp_path, 12, *resume, "--learning_rate", "1e30"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.fixture
def overflowing_run(dataset, tmp_path, monkeypatch):
    """Makes a run in fp16 as accelerate sets it up on a GPU, which it refuses to do here, and what it takes its steps by."""

    def build(init_scale, *more):
        options = unet_args(dataset, tmp_path, 8, "--lr_scheduler", "linear", *more)
        accelerator = set_up_accelerator(options)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=init_scale)
        images, _ = load_training_images(options)
        model = draw_parameters(
            NoisyClassifier(num_classes=2, **model_config(options.architecture, options.format))
        ).train()
        trainer = Trainer(options, accelerator, model, images, AverageOptions(ema_decay=(0.5,)))

        def objective(model, batch):
            timestep = torch.full_like(batch["label"], 10)
            logits = model(batch["image"], timestep).logits
            return LossTerms(classifier_loss(logits, batch["label"]), {}, timestep)

        return trainer, objective

    return build


def test_step_that_overflows_changes_nothing(overflowing_run, tmp_path):
    # Gradients overflow at the first scales, and each overflow halves the scale.
    trainer, objective = overflowing_run(2.0**22)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    seen = []

    def watch(model, batch):
        unchanged = all(map(torch.equal, before, model.parameters()))
        average = all(map(torch.equal, before, trainer.averages[0.5].shadow_params))
        seen.append((unchanged, average, trainer.lr_scheduler.get_last_lr()[0]))
        return objective(model, batch)

    trainer.train(watch)
    skipped = sum(unchanged for unchanged, *_ in seen) - 1
    assert 0 < skipped < 7
    assert all(step == (True, True, 1e-3) for step in seen[: skipped + 1])
    assert all(step[:2] == (False, False) and step[2] < 1e-3 for step in seen[skipped + 1 :])
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["loss_scale"] == 2.0**21 and entries[-1]["loss_scale"] <= 2.0 ** (22 - skipped)
    assert all(math.isfinite(entry["grad_norm"]) for entry in entries)


def test_overflow_that_does_not_end_stops_the_run(overflowing_run):
    trainer, objective = overflowing_run(2.0**60, "--max_skipped_steps", "2")
    with pytest.raises(RuntimeError, match="2 steps in a row overflowed fp16.*bf16.*no checkpoint yet"):
        trainer.train(objective)


def test_epochs_are_as_many_steps_as_they_hold_batches(dataset, tmp_path):
    more = ["--num_epochs", "2", "--gradient_accumulation_steps", "3"]
    train_classifier.main(classifier_args(dataset, tmp_path, 99, *more))
    # 14 images make three batches of four; two passes make six, and three batches make a step.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="--num_epochs"):
        train_classifier.main(classifier_args(dataset, tmp_path / "stream", 9, "--num_epochs", "1", "--streaming"))


def test_metrics_tell_quarters_of_the_timesteps(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3, "--logging_steps", "3"))
    (entry,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    quarters = [entry[f"simple_quarter_{q}"] for q in range(4) if f"simple_quarter_{q}" in entry]
    assert len(quarters) >= 2 and min(quarters) <= entry["simple"] <= max(quarters)
    assert entry["loss"] == pytest.approx(entry["simple"] + entry["vlb"], rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["--loss", "vlb", "--schedule_sampler", "loss-second-moment"],
        ["--no-learn_sigma", "--prediction_type", "sample", "--max_grad_norm", "1.0"],
        ["--noise_offset", "0.1", "--channels_last", "--offload_ema", "--ema_decay", "0.5,0.9"],
        ["--use_ema_warmup", "--ema_power", "0.5"],
        ["--no-class_conditional", "--label_dropout", "0", "--vlb_weight", "1"],
        ["--resnet_time_scale_shift", "default", "--resample_type", "conv", "--output_scale_factor", "1.4142"],
        [
            "--num_attention_heads",
            "2",
            "--gradient_checkpointing",
            "--train_batch_size",
            "2",
            "--total_batch_size",
            "4",
        ],
    ],
    ids=lambda more: more[0],
)
def test_every_option_trains_a_pipeline_that_draws(more, dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 2, *more))
    for folder in tmp_path.glob("pipeline*"):
        pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
        assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (16, 16)
    assert len(list(tmp_path.glob("pipeline*"))) == (2 if "0.5,0.9" in more else 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label_column", "colour"], "colour"),
        (["--image_column", "picture"], "picture"),
        (["--push_every", "5000"], "--push_every needs --push_to_hub"),
        (["--push_to_hub", "--push_every", "7"], "7 is not a multiple of --validation_steps 5000"),
        (["--train_batch_size", "15"], "15"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--no-class_conditional"], "label_dropout"),
        (["--label_dropout", "1.5"], "1.5"),
        (["--checkpoints_total_limit", "0"], "checkpoints_total_limit"),
        (["--num_train_timesteps", "10", "--noise_schedule", "linear"], "diffusion_steps"),
        (["--resolution", "8"], "12, 12"),
    ],
)
def test_bad_options_are_refused(more, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_unet.main(unet_args(dataset, tmp_path, 3, *more))


def test_crops_have_the_resolution_and_keep_the_content():
    rng = random.Random(0)
    image = PILImage.fromarray((np.indices((90, 130)).sum(0) % 256).astype(np.uint8))
    for resolution in (16, 33, 64, 90):
        assert center_crop(image, resolution).size == (resolution, resolution)
        assert random_crop(image, resolution, rng).size == (resolution, resolution)
    padded = to_tensor(fit_image(PILImage.new("L", (28, 28), 255), 32, "pad", rng))
    assert padded.shape == (1, 32, 32)
    assert padded[0, 2:-2, 2:-2].eq(1).all() and padded.eq(-1).sum() == 32 * 32 - 28 * 28
    assert np.array_equal(np.asarray(center_crop(image, 90)), np.asarray(image)[:, 20:110])
    # A margin of three is divided as the published crop divides it: the smaller part first.
    assert np.array_equal(np.asarray(center_crop(image.crop((0, 0, 93, 90)), 90)), np.asarray(image)[:, 1:91])
