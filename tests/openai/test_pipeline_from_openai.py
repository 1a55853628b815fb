"""Pipelines of published checkpoints."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier


@pytest.mark.parametrize(
    "flags, scheduler, expected",
    [
        ("", "DDPMScheduler", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}),
        ("", "DDPMScheduler", {"prediction_type": "epsilon", "timestep_spacing": "linspace"}),
        ("--diffusion_steps 4000", "DDPMScheduler", {"num_train_timesteps": 4000, "beta_end": 0.005}),
        ("--noise_schedule cosine", "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("--predict_xstart True", "DDPMScheduler", {"prediction_type": "sample"}),
        ("--clip_denoised False", "DDPMScheduler", {"clip_sample": False}),
        ("--use_ddim True", "DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 0}),
    ],
)
def test_flags_of_the_diffusion_process_become_the_schedulers_config(pipeline_files, flags, scheduler, expected):
    unet, classifier, model_flags = pipeline_files
    pipeline = ClassifierGuidedPipeline.from_openai(unet, classifier, f"{model_flags} {flags}")
    assert type(pipeline.scheduler).__name__ == scheduler
    assert {name: pipeline.scheduler.config[name] for name in expected} == expected


@pytest.mark.parametrize(
    "case, flags, variance_type",
    [
        ("unet_class_conditional", "", "learned_range"),
        ("unet_unconditional_plain", "", "fixed_large"),
        ("unet_unconditional_plain", "--sigma_small True", "fixed_small"),
    ],
)
def test_variance_becomes_the_schedulers_config(case, flags, variance_type):
    description, _ = load_case(case)
    flags = f"{published_flags(description)} {flags}"
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(description), flags=flags)
    assert pipeline.scheduler.config.variance_type == variance_type
    assert pipeline.classifier is None


def test_respacing_and_scale_become_the_pipelines_defaults(pipeline_files):
    unet, classifier, flags = pipeline_files
    config = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).config
    assert (config.timestep_respacing, config.guidance_scale, config.id2label) == (None, 1.0, None)
    flags += " --timestep_respacing ddim25 --classifier_scale 2.5"
    config = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).config
    assert (config.timestep_respacing, config.guidance_scale) == ("ddim25", 2.5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--timestep_respacing 2000", "2000"),
        ("--noise_schedule quadratic", "noise_schedule quadratic is not one of"),
        ("--diffusion_steps 10", "at least 20"),
    ],
)
def test_flags_of_no_diffusion_process_are_refused(pipeline_files, flags, message):
    unet, classifier, model_flags = pipeline_files
    with pytest.raises(ValueError, match=message):
        ClassifierGuidedPipeline.from_openai(unet, classifier, f"{model_flags} {flags}")


def test_unprefixed_flags_describe_the_unet_alone(tmp_path):
    unet, _ = load_case("unet_class_conditional")
    with torch.device("meta"):
        classifier = NoisyClassifier(
            sample_size=32, model_channels=64, channel_mult=(1, 1, 2), layers_per_block=2, attention_resolutions=(8,)
        )
    flags = f"{published_flags(unet)} --classifier_width 64 --classifier_attention_resolutions 8"
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(unet), classifier.to_openai_state_dict(), flags)
    assert pipeline.unet.config.channel_mult == (1, 2, 2)
    assert pipeline.classifier.config.channel_mult == (1, 1, 2)
