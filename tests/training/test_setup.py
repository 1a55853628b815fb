"""Setup of the training scripts from their options."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors.torch import load_file
from tiny_models import draw_parameters, tiny_classifier
from training_runs import ARCHITECTURE, checkpoint_tensors, classifier_args, unet_args

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.objective import build_noise_scheduler, sampling_defaults
from diffusers_adm.training.options import LR_SCHEDULERS, OptimisationOptions
from diffusers_adm.training.pretrained import load_pretrained
from diffusers_adm.training.setup import build_lr_scheduler, build_unet, prepare_model, set_up_accelerator


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


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_learning_rate_schedule_begins_with_the_warm_up(name):
    weight = torch.nn.Parameter(torch.zeros(1))
    options = OptimisationOptions(max_train_steps=8, learning_rate=0.1, lr_scheduler=name, lr_warmup_steps=4)
    optimizer = torch.optim.SGD([weight], options.learning_rate)
    scheduler = build_lr_scheduler(optimizer, options)
    rates = []
    for _ in range(options.max_train_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert (rates[5:] == [0.1] * 3) is name.startswith("constant")


def test_accumulation_that_the_batch_size_replaces_is_named(dataset, tmp_path, caplog):
    words = ["--gradient_accumulation_steps", "3", "--total_batch_size", "8"]
    options = unet_args(dataset, tmp_path, 1, *words)
    set_up_accelerator(options)
    assert options.optimisation.gradient_accumulation_steps == 2
    assert "--gradient_accumulation_steps is 2 instead of 3, because of --total_batch_size 8." in caplog.text


def test_attention_backend_of_a_training_stays_its_own(dataset, tmp_path, monkeypatch):
    used = _AttentionBackendRegistry.get_active_backend()
    options = unet_args(dataset, tmp_path, 1)
    unet, accelerator = build_unet(options, num_classes=2), set_up_accelerator(options)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "bf16")
    prepare_model(unet, options, accelerator)
    assert {processor._attention_backend.value for processor in unet.attn_processors.values()} == {"_native_math"}
    assert _AttentionBackendRegistry.get_active_backend() == used


@pytest.mark.parametrize("groups, warned", [(8, True), (4, False)])
def test_normalisation_that_takes_away_the_brightness_is_named(groups, warned, dataset, tmp_path, caplog):
    train_unet.main(unet_args(dataset, tmp_path, 1, "--norm_num_groups", str(groups)))
    assert ("Pass a smaller --norm_num_groups, such as 2" in caplog.text) is warned


def test_positions_of_another_resolution_begin_at_random_for_that_reason(tmp_path, caplog):
    PartialState()
    tiny_classifier(sample_size=8).save_pretrained(tmp_path)
    load_pretrained(tiny_classifier(sample_size=16, attention_resolutions=(8,)), str(tmp_path))
    assert "positional_embedding begin at random values, because of sample_size 16 instead of 8" in caplog.text


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
    assert "class_embedding.weight begin at random values, because of num_class_embeds 2 instead of 7" in caplog.text

    conditional = saved("conditional", num_classes=2, label_dropout=0.0)
    train_unet.main(unet_args(dataset, tmp_path / "null", 1, *frozen, str(tmp_path / "conditional")))
    trained = load_file(tmp_path / "null" / "checkpoint-1" / "model.safetensors")
    assert torch.equal(trained["class_embedding.weight"][:2], conditional["class_embedding.weight"])


def test_launcher_runs_the_script_as_the_readme_says(dataset, tmp_path):
    script = train_unet.__file__
    options = f"--dataset_name {dataset} --output_dir {tmp_path} --max_train_steps 2 --ema_decay 0.5"
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", script, *options.split(), *ARCHITECTURE],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (tmp_path / "pipeline" / "model_index.json").exists()


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
        (["--push_every", "5000"], "--push_every requires --push_to_hub"),
        (["--push_to_hub"], "--push_to_hub requires --hub_model_id, such as me/my-model, but got None"),
        (["--push_to_hub", "--hub_model_id", "mine"], "such as me/my-model, but got mine"),
        (
            "--push_to_hub --hub_model_id me/it --push_every 7".split(),
            "multiple of --validation_steps 100, .* but got 7",
        ),
        (["--train_batch_size", "15"], "15"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--no-class_conditional"], "label_dropout"),
        (["--label_dropout", "1.5"], "1.5"),
        (["--checkpoints_total_limit", "0"], "checkpoints_total_limit"),
        (["--num_train_timesteps", "10", "--noise_schedule", "linear"], "diffusion_steps"),
        (["--resolution", "8"], "12x12"),
        (["--use_8bit_adam"], "pip install bitsandbytes"),
        (["--report_to", "comet_ml"], "comet_ml is not installed.*tensorboard"),
    ],
)
def test_bad_options_are_refused_and_by_a_dry_run_too(more, message, dataset, tmp_path):
    for dry_run in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=message):
            train_unet.main(unet_args(dataset, tmp_path, 3, *more, *dry_run))


def test_bad_folders_are_refused_and_by_a_dry_run_too(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    train_classifier.main(classifier_args(dataset, tmp_path / "used", 1))
    for dry_run in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="file is not a folder"):
            train_classifier.main(classifier_args(dataset, tmp_path / "file" / "run", 1, *dry_run))
        with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run"):
            train_classifier.main(classifier_args(dataset, tmp_path / "used", 1, *dry_run))
        with pytest.raises(ValueError, match="trained with other options: --seed 1"):
            resumed = ["--resume_from_checkpoint", str(tmp_path / "used" / "checkpoint-1"), "--seed", "1"]
            train_classifier.main(classifier_args(dataset, tmp_path / "other", 1, *resumed, *dry_run))


@pytest.mark.parametrize(("timesteps", "steps"), [("100", 100), ("1000", 250)])
def test_pipeline_takes_no_more_steps_than_the_training_has_timesteps(timesteps, steps, dataset, tmp_path):
    options = unet_args(dataset, tmp_path, 1, "--num_train_timesteps", timesteps)
    assert sampling_defaults(options)["num_inference_steps"] == steps


@pytest.mark.parametrize("distributed_type", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_launchers_that_divide_the_weights_are_refused(distributed_type, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", distributed_type)
    with pytest.raises(ValueError, match=f"{distributed_type.value} is not supported"):
        set_up_accelerator(
            train_unet.parse_args(["--output_dir", "out", "--train_data_dir", "images", "--max_train_steps", "1"])
        )
