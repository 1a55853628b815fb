"""Classifier-free guidance, and guidance by a weaker UNet."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from guided_calls import LABELS, NULL, calls_of, draw, one_step_x_0, pipeline_of
from tiny_models import SIZE, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline


def epsilon_of(unet, x_t: torch.Tensor, labels: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return unet(x_t, torch.zeros(len(x_t), dtype=torch.long), torch.tensor(labels)).sample[:, :3]


@pytest.mark.parametrize("weights", [1.5, [0.5, 3.0], -1.0])
def test_classifier_free_guidance_moves_epsilon_away_from_that_of_no_class(weights):
    pipeline, x_t = pipeline_of(DDIMScheduler, clip_sample=False), images()
    rows = calls_of(pipeline.unet)
    found = draw(pipeline, cfg_weight=weights, timesteps=[0], latents=x_t)
    assert rows == [4]  # both in one evaluation
    w = torch.as_tensor(weights).expand(2)[:, None, None, None]
    epsilon = (1 + w) * epsilon_of(pipeline.unet, x_t, LABELS) - w * epsilon_of(pipeline.unet, x_t, [NULL, NULL])
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)


def test_weight_of_minus_one_is_the_unconditional_model_and_zero_costs_nothing():
    pipeline = pipeline_of(DDIMScheduler)
    unconditional = draw(pipeline, condition_unet=False)
    torch.testing.assert_close(draw(pipeline, cfg_weight=-1.0), unconditional, rtol=1e-4, atol=1e-4)
    rows = calls_of(pipeline.unet)
    conditional = draw(pipeline)
    assert torch.equal(draw(pipeline, cfg_weight=0.0), conditional)
    assert rows == [2] * 8
    assert (conditional - unconditional).abs().max() > 1e-2


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, UniPCMultistepScheduler])
def test_both_kinds_of_guidance_together(scheduler_class):
    pipeline = pipeline_of(scheduler_class)
    drawn = {
        (weight, scale): draw(pipeline, cfg_weight=weight, guidance_scale=scale)
        for weight in (0.0, 2.0)
        for scale in (0.0, 20.0)
    }
    values = list(drawn.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(values) for b in values[:i])
    assert all(value.isfinite().all() for value in values)


def test_a_weaker_unet_takes_the_place_of_no_class():
    pipeline, x_t = pipeline_of(DDIMScheduler, clip_sample=False), images()
    weaker = tiny_unet(seed=7)
    found = draw(pipeline, cfg_weight=2.0, weaker=weaker, timesteps=[0], latents=x_t)
    epsilon = 3 * epsilon_of(pipeline.unet, x_t, LABELS) - 2 * epsilon_of(weaker, x_t, LABELS)
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)
    weaker = torch.compile(weaker, backend="eager")
    again = draw(pipeline, cfg_weight=2.0, weaker=weaker, timesteps=[0], latents=x_t)
    torch.testing.assert_close(again, found)
    itself = draw(pipeline, cfg_weight=2.0, weaker=pipeline.unet)
    torch.testing.assert_close(itself, draw(pipeline), rtol=1e-3, atol=1e-3)
    unlabelled = tiny_unet(num_class_embeds=None)
    assert draw(pipeline, cfg_weight=1.0, weaker=unlabelled).isfinite().all()


def test_an_upsampler_with_a_null_class_is_guided_too():
    unet = tiny_unet(low_res_conditioning=True, use_null_class=True)
    pipeline = ADMUpsamplePipeline(unet, tiny_scheduler(DDIMScheduler), low_res_size=SIZE // 2, num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    small = images(2, 3, SIZE // 2, SIZE // 2).sigmoid()

    def enlarged(**call):
        return pipeline(small, generator=torch.Generator().manual_seed(0), output_type="latent", **call).images

    guided = enlarged(class_labels=LABELS, cfg_weight=2.0)
    assert (guided - enlarged(class_labels=LABELS)).abs().max() > 1e-3
    torch.testing.assert_close(enlarged(class_labels=LABELS, cfg_weight=-1.0), enlarged(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="is given the class"):
        enlarged(cfg_weight=1.0)


def test_no_null_class_no_classifier_free_guidance():
    with pytest.raises(ValueError, match="use_null_class"):
        draw(tiny_pipeline(), cfg_weight=1.0)

    def through(x_t, timestep, x_0, class_labels):
        return x_0.sum(dim=(1, 2, 3))

    through.through_unet = True
    with pytest.raises(ValueError, match="through_unet=True"):
        draw(pipeline_of(), guidance_fn=through, guidance_options={"gradient_at": "mean"})
    with pytest.raises(ValueError, match="gradient_at='mean' requires DDPMScheduler"):
        draw(pipeline_of(DDIMScheduler), guidance_options={"gradient_at": "mean"})
