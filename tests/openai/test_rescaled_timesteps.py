"""Models that were trained with rescaled timesteps: the networks are told t * 1000 / T."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags
from tiny_models import tiny_classifier, tiny_unet

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier


def load_improved(**changes):
    """A pipeline of the recorded UNet of 4000 steps."""
    case, _ = load_case("improved_unet")
    flags = published_flags({"flags": case["flags"] | changes})
    return ClassifierGuidedPipeline.from_openai(draw_weights(case), flags=flags)


def test_unet_is_told_the_scaled_timestep():
    _, io = load_case("improved_unet")
    unet = load_improved().unet
    assert unet.config.timestep_scale == 0.25
    with torch.no_grad():
        sample = unet(io["sample"], io["step_index"]).sample
    assert (sample - io["output"]).norm() / io["output"].norm() < 2e-5
    unscaled = load_improved(rescale_timesteps=False).unet
    with torch.no_grad():
        assert torch.equal(unscaled(io["sample"], io["step_index"] * 0.25).sample, sample)


@pytest.mark.parametrize("tiny_model", [tiny_unet, tiny_classifier])
def test_scale_is_saved_and_must_be_a_positive_number(tiny_model, tmp_path):
    model = tiny_model(timestep_scale=0.25)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).time_embedding.timestep_scale == 0.25
    assert tiny_model().config.timestep_scale == 1.0
    for scale in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timestep_scale"):
            tiny_model(timestep_scale=scale)


def test_classifier_of_the_same_command_line_is_told_the_scaled_timestep():
    unet, classifier = load_case("unet_class_conditional")[0], load_case("classifier_attention")[0]
    flags = f"{published_flags(unet)} {published_flags(classifier)} --diffusion_steps 4000 --rescale_timesteps"
    for rescaled, scale in ((True, 0.25), (False, 1.0)):
        pipeline = ClassifierGuidedPipeline.from_openai(
            draw_weights(unet), draw_weights(classifier), f"{flags} {rescaled}"
        )
        assert pipeline.unet.config.timestep_scale == pipeline.classifier.config.timestep_scale == scale
    thousand = flags.replace("4000", "1000") + " True"
    assert NoisyClassifier.from_openai(draw_weights(classifier), thousand).config.timestep_scale == 1.0


def test_flags_that_do_not_tell_whether_timesteps_are_rescaled_are_refused():
    case, _ = load_case("improved_unet")
    flags = published_flags({"flags": {k: v for k, v in case["flags"].items() if k != "rescale_timesteps"}})
    with pytest.raises(ValueError, match="--rescale_timesteps is required with --diffusion_steps 4000"):
        ADMUNet2DModel.from_openai(draw_weights(case), flags)
    # Only guided-diffusion has this flag, and its default is False.
    config = ADMUNet2DModel.from_openai(draw_weights(case), f"{flags} --num_head_channels -1").config
    assert config.timestep_scale == 1.0
