"""Files that are saved and values that are logged during training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import checkpoint_tensors, classifier_args, unet_args

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.losses import classifier_loss
from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.denoising import label_conditions
from diffusers_adm.training.metrics import read_metrics
from diffusers_adm.training.objective import DenoisingObjective, LossTerms, build_noise_scheduler
from diffusers_adm.training.setup import load_training_images, model_config, set_up_accelerator
from diffusers_adm.training.trainer import Trainer


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


def test_end_of_a_run_that_goes_back_publishes_that_step(dataset, tmp_path):
    options = ["--validation_steps", "1", "--checkpointing_steps", "1", "--checkpoints_total_limit", "9"]
    train_unet.main(unet_args(dataset, tmp_path, 2, *options))
    (tmp_path / "checkpoint-2").rename(tmp_path / "later")
    train_unet.main(unet_args(dataset, tmp_path, 1, *options, "--resume_from_checkpoint", "latest"))
    checkpoint = checkpoint_tensors(tmp_path / "checkpoint-1")["ema-0.5.safetensors"]
    published = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(published[key], tensor) for key, tensor in checkpoint.items())
    picture = (tmp_path / "samples" / "step-1.png").read_bytes()
    assert (tmp_path / "pipeline" / "samples" / "grid.png").read_bytes() == picture


def test_losses_before_a_stop_are_logged(dataset, tmp_path):
    options = classifier_args(dataset, tmp_path, 4, "--logging_steps", "4")
    accelerator = set_up_accelerator(options)
    images, _ = load_training_images(options)
    config = model_config(options.architecture, options.format)
    trainer = Trainer(options, accelerator, NoisyClassifier(num_classes=2, **config).train(), images)

    def objective(model, batch):
        trainer.stop.received = trainer.global_step == 1  # asked to stop during the second step
        timestep = torch.zeros_like(batch["label"])
        return LossTerms(classifier_loss(model(batch["image"], timestep).logits, batch["label"]), {}, timestep)

    trainer.train(objective)
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [2]


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


def test_metrics_tell_quarters_of_the_timesteps(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3, "--logging_steps", "3"))
    (entry,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    quarters = [entry[f"simple_quarter_{q}"] for q in range(4) if f"simple_quarter_{q}" in entry]
    assert len(quarters) >= 2 and min(quarters) <= entry["simple"] <= max(quarters)
    assert entry["loss"] == pytest.approx(entry["simple"] + entry["vlb"], rel=1e-5)
