"""Saved pipelines, and what diffusers' own pipeline tester expects."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from pipeline_calls import (
    NAMES,
    SCALE,
    STEPS,
    draw,
    every_solver,
    seeded,
    solver_pipeline,
)
from tiny_models import tiny_classifier, tiny_pipeline, tiny_scheduler

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


# Saving and loading


@pytest.mark.parametrize("with_classifier", [True, False], ids=["classifier", "no classifier"])
@every_solver
def test_saved_pipeline_draws_equal_images(solver, with_classifier, tmp_path):
    pipeline, call = solver_pipeline(
        solver,
        with_classifier=with_classifier,
        id2label=NAMES,
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
    )
    pipeline.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.classifier is None) != with_classifier
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert loaded.config.id2label == NAMES and all(type(label) is int for label in loaded.config.id2label)
    arguments = {"generator": seeded(), "output_type": "latent", **call}
    output = loaded(["goldfish", "ray"], **arguments).images
    assert torch.equal(output, draw(pipeline, guidance_scale=None, num_inference_steps=None, **call))

    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "model_index.json").read_text())
    first = json.loads((tmp_path / "model_index.json").read_text())
    assert {**again, "_name_or_path": None} == {**first, "_name_or_path": None}


def test_component_may_be_left_out_or_replaced_when_loading(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    without = ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=None)
    assert without.classifier is None
    other = tiny_classifier(seed=9)
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=other).classifier is other


def test_pipeline_saved_in_half_precision_with_a_variant(tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == loaded.classifier.dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("released:imagenet-64", {}, r"Only commands accept names such as 'released:.* Call from_released\('imagenet-64'\)"),
        ("shipped:adm-cifar-32", {}, r"Only commands accept names such as 'shipped:.* default_photo_model\(\)"),
        ("saved", {"dtype": "float16"}, "`dtype` must be a floating-point type, such as torch.float16, but got 'float16'"),
        ("saved", {"dtype": {"unet": "half"}}, "`dtype` must be a floating-point type"),
    ],
)  # fmt: skip
def test_names_and_types_that_only_commands_accept_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierGuidedPipeline.from_pretrained(name, **options)


def test_misspelt_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="There is no folder 'my-modle'"):
        ClassifierGuidedPipeline.from_pretrained("my-modle", cache_dir=tmp_path, local_files_only=True)


def test_numbers_of_numpy_are_saved(tmp_path):
    tiny_pipeline(guidance_scale=np.float32(2), num_inference_steps=np.int64(3)).save_pretrained(tmp_path)
    config = ClassifierGuidedPipeline.from_pretrained(tmp_path).config
    assert (config.guidance_scale, config.num_inference_steps) == (2.0, 3)


def test_one_file_takes_the_place_of_shards(tmp_path):
    pipeline = tiny_pipeline()
    for size in ("20KB", None):
        pipeline.save_pretrained(tmp_path, max_shard_size=size)
        loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
        assert torch.equal(loaded.unet.conv_out.weight, pipeline.unet.conv_out.weight)


@pytest.mark.parametrize("part", [tiny_pipeline, tiny_classifier])
def test_weights_are_saved_as_safetensors_only(part, tmp_path):
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        part().save_pretrained(tmp_path, safe_serialization=False)
    assert not any(tmp_path.iterdir())


# What diffusers' own pipeline tester expects


def test_components_make_another_pipeline():
    pipeline = tiny_pipeline(id2label=NAMES)
    other = ClassifierGuidedPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    assert set(pipeline.components) == {"unet", "scheduler", "classifier"}
    assert torch.equal(draw(other), draw(pipeline))
    ddim = ClassifierGuidedPipeline.from_pipe(pipeline, scheduler=tiny_scheduler(DDIMScheduler))
    assert ddim.unet is pipeline.unet and isinstance(ddim.scheduler, DDIMScheduler)


def test_scheduler_made_from_anothers_config_works():
    pipeline = tiny_pipeline()
    for scheduler_class in SUPPORTED_SCHEDULERS:
        settings = {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {}
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **settings)
        assert draw(pipeline).isfinite().all()


def test_pipeline_declares_what_diffusers_reads():
    assert issubclass(ClassifierGuidedPipeline, DiffusionPipeline)
    assert ClassifierGuidedPipeline._optional_components == ["classifier"]
    assert ClassifierGuidedPipeline.model_cpu_offload_seq.split("->") == ["unet", "classifier"]
    assert ClassifierGuidedPipeline._callback_tensor_inputs == ["latents", "x_0", "gradient", "log_probabilities"]
    assert tiny_pipeline(with_classifier=False).classifier is None
