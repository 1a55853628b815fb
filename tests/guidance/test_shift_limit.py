"""Limit of the distance by which guidance moves the predicted x_0."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    SASolverScheduler,
)
from guided_calls import draw, pipeline_of

from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


DEVIATION = 0.4  # of the clean images, which are Gaussian
FAST = [scheduler for scheduler in SUPPORTED_SCHEDULERS if scheduler not in (DDIMScheduler, DDPMScheduler)]

NEED_STEPS = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)


def wrong_direction(x_t, timestep, x_0, class_labels):
    """Gradient as small as that of a trained classifier at the noisiest timesteps, without information about x_0."""
    return 0.007 * torch.randn(x_t.shape[1:], generator=torch.Generator().manual_seed(1)).expand_as(x_t)


def share_of_extremes(pipeline, scale: float, **options) -> float:
    """Draws with the exact prediction for Gaussian images, and returns the share of values that are black or white."""
    alpha_bar = NoiseSchedule.from_config(pipeline.scheduler.config).alpha_bar.float()
    seen = {}

    def remember(_, step, timestep, tensors):
        seen["x_t"] = tensors["latents"]
        return {}

    def exact(x_0, timestep):
        signal = alpha_bar[int(timestep)]
        return signal.sqrt() * DEVIATION**2 / (signal * DEVIATION**2 + 1 - signal) * seen["x_t"]

    images = draw(
        pipeline,
        guidance_scale=scale,
        guidance_fn=wrong_direction,
        x_0_fn=exact,
        callback_on_step_start=remember,
        **{"num_inference_steps": None if "timestep_respacing" in options else 10, **options},
    )
    return (images.abs() > 0.99).float().mean().item()


def cosine_pipeline(scheduler_class: type):
    steps = {"skip_prk_steps": True} if scheduler_class.__name__ == "PNDMScheduler" else {}
    return pipeline_of(scheduler_class, beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000, **steps)


@pytest.mark.parametrize("scheduler_class", FAST, ids=lambda scheduler: scheduler.__name__)
def test_fast_solvers_do_not_oversaturate_images_of_the_cosine_schedule(scheduler_class):
    pipeline = cosine_pipeline(scheduler_class)
    steps = 50 if scheduler_class in NEED_STEPS else 10
    unguided = share_of_extremes(pipeline, 0.0, num_inference_steps=steps)
    assert unguided < 0.05
    assert share_of_extremes(pipeline, 4.0, num_inference_steps=steps) < unguided + 0.05


@pytest.mark.parametrize("scheduler_class", NEED_STEPS, ids=lambda scheduler: scheduler.__name__)
def test_too_few_steps_of_the_cosine_schedule_are_said(scheduler_class):
    with pytest.raises(UserWarning, match="from noise level 20291 to .* in one step.*num_inference_steps=10"):
        draw(cosine_pipeline(scheduler_class), num_inference_steps=10)


def test_one_argument_lifts_the_limit():
    pipeline = cosine_pipeline(DPMSolverMultistepScheduler)
    assert share_of_extremes(pipeline, 4.0, guidance_options={"max_x_0_shift": None}) > 0.5


def test_ddim_warns_where_the_original_code_burns_and_one_argument_cures_it():
    pipeline = cosine_pipeline(DDIMScheduler)
    with pytest.warns(UserWarning, match="noise level 20291.*max_x_0_shift"):
        assert share_of_extremes(pipeline, 4.0, timestep_respacing="10") > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cured = share_of_extremes(pipeline, 4.0, timestep_respacing="10", guidance_options={"max_x_0_shift": 0.5})
        assert cured < share_of_extremes(pipeline, 0.0, timestep_respacing="10") + 0.05


def test_the_limit_shortens_gradients_and_keeps_their_direction():
    gradients = {None: [], 0.5: []}
    for limit, collected in gradients.items():

        def collect(_, step, timestep, tensors):
            collected.append(tensors["gradient"].clone())
            return {}

        pipeline = cosine_pipeline(DPMSolverMultistepScheduler)
        options = {"callback_on_step_end": collect, "callback_on_step_end_tensor_inputs": ["gradient"]}
        share_of_extremes(pipeline, 4.0, guidance_options={"max_x_0_shift": limit}, **options)
    (free, *_, free_last), (limited, *_, limited_last) = gradients[None], gradients[0.5]
    torch.testing.assert_close(limited_last, free_last, rtol=0, atol=0)
    size, free_size = (gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() for gradient in (limited, free))
    torch.testing.assert_close(20291 * size.flatten(), torch.full((2,), 0.5), rtol=1e-3, atol=0)
    torch.testing.assert_close(limited * (free_size / size), free)


def test_sa_solver_is_not_guided_at_the_highest_noise_level():
    """Later steps of a multistep solver extrapolate the effect of guidance."""
    pipeline, guided = cosine_pipeline(SASolverScheduler), []

    def remember(_, step, timestep, tensors):
        guided.append(tensors["gradient"] is not None)
        return {}

    call = {"guidance_scale": 1.0, "num_inference_steps": 5, "callback_on_step_end": remember}
    draw(pipeline, **call, callback_on_step_end_tensor_inputs=["gradient"])
    draw(pipeline, **call, guidance_options={"interval": (0, 1e5)}, callback_on_step_end_tensor_inputs=["gradient"])
    draw(pipeline, **call, guidance_options={"max_x_0_shift": 0.5}, callback_on_step_end_tensor_inputs=["gradient"])
    assert guided == [False] + 14 * [True]
