"""Sampling with UNets that are told the noise level and predict x_0."""

import logging

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.diffusion import NoiseSchedule, timestep_at
from diffusers_adm.guidance import ClassifierGuidance, classifier_gradient
from diffusers_adm.models.unet_adm import ADMUNet2DOutput


COSINE = NoiseSchedule.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
SIGMA = COSINE.sigma[700].item()


def edm_unet(**changes):
    return tiny_unet(**{"out_channels": 3, "preconditioning": "edm", "timestep_scale": 1000.0, **changes})


def edm_pipeline(scheduler=None, classifier=None, **changes):
    scheduler = HeunDiscreteScheduler() if scheduler is None else scheduler
    unet = edm_unet(**changes)
    return tiny_pipeline(unet, scheduler, classifier, with_classifier=False, num_inference_steps=4)


def draw(pipeline, **call):
    call = {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(0), "output_type": "latent", **call}
    return pipeline(**call).images


def noised_classifier():
    return tiny_classifier(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


# --- Steps ---


def predict_with(pipeline, function):
    """Replaces the UNet's layers by a function of the noised images and their noise level."""

    def forward(sample, sigma, class_labels=None, low_res=None):
        return ADMUNet2DOutput(sample=function(sample, sigma[:, None, None, None]))

    pipeline.unet.forward = forward


@pytest.mark.parametrize(
    "scheduler_class",
    [
        HeunDiscreteScheduler,
        EDMEulerScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        KDPM2DiscreteScheduler,
        EDMDPMSolverMultistepScheduler,
        CMStochasticIterativeScheduler,
    ],
)
def test_every_method_ends_at_the_only_image_there_is(scheduler_class):
    pipeline = edm_pipeline(scheduler_class())
    x_0 = images(1).clamp(-1, 1)
    predict_with(pipeline, lambda x, sigma: x_0.expand_as(x))
    levels = []

    def look(pipeline, step, timestep, tensors):
        x = tensors["latents"] * (1 + timestep**2).sqrt()
        levels.append((timestep.item(), ((x - x_0).std() / timestep).item()))
        return {}

    drawn = draw(pipeline, callback_on_step_start=look, num_inference_steps=6)
    torch.testing.assert_close(drawn, x_0.expand(2, -1, -1, -1), rtol=0, atol=2e-5)
    # Images that are noised by sigma are what the network is asked about, at every step.
    assert levels[0][0] == pytest.approx(80)
    assert all(0.8 < ratio < 1.2 for _, ratio in levels)


@pytest.mark.parametrize("scheduler_class", [HeunDiscreteScheduler, EDMEulerScheduler, KDPM2DiscreteScheduler])
def test_churn_raises_the_noise_level_within_its_window(scheduler_class):
    pipeline = edm_pipeline(scheduler_class())
    visited = []

    def look(pipeline, step, timestep, tensors):
        visited.append(timestep.item())
        return {}

    plain = draw(pipeline, callback_on_step_start=look)
    untouched, visited = visited, []
    assert torch.equal(draw(pipeline, churn={"s_churn": 8, "s_tmin": 100}), plain)
    churned = draw(pipeline, callback_on_step_start=look, churn={"s_churn": 8, "s_tmax": 50})
    assert not torch.equal(churned, plain)
    assert visited[0] == untouched[0]  # above the window
    raised = [now / before for now, before in zip(visited, untouched) if now != before]
    assert raised and max(raised) == pytest.approx(2**0.5)  # the most of a step


def test_noise_of_the_first_step_is_added_to_the_noise_of_the_start():
    pipeline, first, x_T = edm_pipeline(), [], images()

    def look(pipeline, step, timestep, tensors):
        first.append((tensors["latents"], timestep))
        return {}

    draw(pipeline, latents=x_T, callback_on_step_start=look, churn={"s_churn": 4, "s_noise": 2.0})
    x_t, sigma = first[0]
    assert sigma.item() == pytest.approx(80 * 2**0.5)
    noise = torch.randn(x_T.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x_t * (1 + sigma**2).sqrt(), 80 * x_T + 2 * 80 * noise, rtol=1e-5, atol=1e-3)


def test_order_of_all_but_eulers_method_is_the_second():
    # For the normal distribution of deviation 1 the path is known: x / sqrt(1 + sigma^2) is constant.
    errors = {}
    schedulers = (EDMEulerScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, EDMDPMSolverMultistepScheduler)
    for scheduler_class in schedulers:
        scheduler = scheduler_class()
        scheduler.register_to_config(clip_sample=False)
        for steps in (40, 80):
            pipeline = edm_pipeline(scheduler)
            predict_with(pipeline, lambda x, sigma: x / (1 + sigma**2))
            small = 0.01 * images()
            drawn = draw(pipeline, latents=small, num_inference_steps=steps)
            exact = small * 80 / (1 + 80**2) ** 0.5
            errors[scheduler_class, steps] = ((drawn - exact).norm() / exact.norm()).item()
    euler, *others = (errors[one, 40] / errors[one, 80] for one in schedulers)
    assert 1.7 < euler < 2.3
    assert all(3.4 < other < 4.6 for other in others)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMEulerScheduler(sigma_schedule="exponential", final_sigmas_type="sigma_min"),
        EDMDPMSolverMultistepScheduler(),
        EDMDPMSolverMultistepScheduler(solver_order=3, sigma_max=40.0),
        EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
)
def test_schedulers_of_edm_draw_what_they_draw_with_a_network_without_scales(scheduler, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    scheduler.register_to_config(clip_sample=False)
    pipeline, labels, generator = edm_pipeline(scheduler), torch.tensor([1, 2]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = draw(pipeline, num_inference_steps=5)
        scheduler.set_timesteps(5)
        x = scheduler.sigmas[0] * torch.randn(drawn.shape, generator=generator)
        for t in scheduler.timesteps:
            output = pipeline.unet._network(scheduler.scale_model_input(x, t), t, labels, None)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    assert "not expected" not in caplog.text


@pytest.mark.parametrize(
    "scheduler_class",
    [EDMEulerScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, EDMDPMSolverMultistepScheduler],
)
def test_listed_noise_levels_and_restart(scheduler_class):
    """For the normal distribution of deviation 1, the path is known. A restart draws it from a start that is only zeros."""
    scheduler, told = scheduler_class(), []
    scheduler.register_to_config(clip_sample=False)
    pipeline = edm_pipeline(scheduler)
    predict_with(pipeline, lambda x, sigma: told.append(sigma.max().item()) or x / (1 + sigma**2))
    levels = [80 * (1 - step / 60) ** 7 for step in range(46)]
    drawn = draw(pipeline, latents=0.01 * images(), sigmas=levels)
    exact = 0.01 * images() * 80 / (1 + 80**2) ** 0.5
    assert ((drawn - exact).norm() / exact.norm()).item() < (0.2 if scheduler_class is EDMEulerScheduler else 0.02)
    assert set(levels) <= {min(levels, key=lambda level: abs(level - sigma)) for sigma in told}
    small = draw(pipeline, latents=torch.zeros(2, 3, 64, 64), height=64, width=64, sigmas=levels)
    assert small.abs().max() == 0
    part = {"sigma_min": 0.05, "sigma_max": 60.0, "times": 1}
    drawn = draw(pipeline, latents=torch.zeros(2, 3, 64, 64), height=64, width=64, sigmas=levels, restart=part)
    assert drawn.std().item() == pytest.approx(1, abs=0.1)


def test_consistency_model_takes_noise_levels():
    pipeline, told = edm_pipeline(CMStochasticIterativeScheduler()), []
    predict_with(pipeline, lambda x, sigma: told.append((sigma.max().item(), x.std().item())) or 0 * x)
    draw(pipeline, sigmas=[80.0, 0.8], latents=images())
    (first, deviation), (second, middle) = told
    assert (first, second) == (pytest.approx(80), pytest.approx(0.8))
    assert deviation == pytest.approx(80, rel=0.2) and middle == pytest.approx(0.8, rel=0.2)


def test_image_is_the_same_in_any_batch():
    for scheduler, call in (
        (HeunDiscreteScheduler(), {"churn": {"s_churn": 8}}),
        (EulerAncestralDiscreteScheduler(), {}),
        (CMStochasticIterativeScheduler(), {"timestep_respacing": "0,22,39"}),
    ):
        pipeline = edm_pipeline(scheduler)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        both = draw(pipeline, generator=generators, **call)
        one = draw(pipeline, class_labels=[2], generator=[torch.Generator().manual_seed(4)], **call)
        torch.testing.assert_close(both[1:], one, rtol=1e-5, atol=1e-5)


def test_steps_of_a_consistency_model_are_given_in_either_way():
    pipeline = edm_pipeline(CMStochasticIterativeScheduler(), preconditioning="consistency")
    published = draw(pipeline, timestep_respacing="0,22,39")
    assert torch.equal(published, draw(pipeline, timesteps=[22, 0]))
    assert not torch.equal(published, draw(pipeline, num_inference_steps=1))
    assert torch.equal(draw(pipeline, num_inference_steps=2), draw(pipeline, timesteps=[20, 0]))


# --- Guidance ---


def one_step(pipeline, **call):
    """x_0 after one step of Euler's method from SIGMA to 0, and the x that it started from."""
    x_T = images()
    drawn = draw(pipeline, latents=x_T, num_inference_steps=1, **call)
    return drawn, SIGMA * x_T


def euler():
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=SIGMA)


def test_classifier_guides_at_the_timestep_of_the_noise_level():
    classifier, labels = noised_classifier(), torch.tensor([1, 2])
    pipeline = edm_pipeline(euler(), classifier)
    guided, x = one_step(pipeline, guidance_scale=0.5)
    x_t = x / (1 + SIGMA**2) ** 0.5
    gradient = classifier_gradient(classifier, x_t, torch.tensor([700, 700]), labels) / (1 + SIGMA**2) ** 0.5
    with torch.no_grad():
        x_0 = pipeline.unet(x, SIGMA, labels).sample.clamp(-1, 1)
    expected = x_0 + 0.5 * SIGMA**2 * gradient  # with respect to x = x_0 + sigma * epsilon
    assert (expected - x_0).abs().max() > 1e-3
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)


def test_timestep_of_a_noise_level_lies_between_those_of_the_schedule():
    sigma = torch.stack(
        [COSINE.sigma[10], COSINE.sigma[10:12].log().mean().exp(), torch.tensor(1e-5), torch.tensor(1e6)]
    )
    torch.testing.assert_close(timestep_at(COSINE, sigma.float()), torch.tensor([10, 10.5, 0, 999]), rtol=0, atol=1e-2)


def test_prediction_without_a_class_and_of_another_unet_guide():
    labels = torch.tensor([1, 2])
    pipeline = edm_pipeline(euler(), use_null_class=True)
    weaker = edm_unet(seed=5, use_null_class=True)
    for call, unet, other_labels in (
        ({}, pipeline.unet, torch.tensor([5, 5])),
        ({"weaker": weaker}, weaker, labels),
    ):
        drawn, x = one_step(pipeline, cfg_weight=0.5, **call)
        with torch.no_grad():
            x_0 = 1.5 * pipeline.unet(x, SIGMA, labels).sample - 0.5 * unet(x, SIGMA, other_labels).sample
        torch.testing.assert_close(drawn, x_0.clamp(-1, 1), rtol=0, atol=1e-5)


# --- Precision, files, bad input ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_noise_survives_weights_in_half_precision(dtype):
    unet, x = edm_unet(), images().clamp(-1, 1)
    sigma = 0.002
    noisy = x + sigma * images(seed=3)
    with torch.no_grad():
        exact = unet(noisy, sigma, torch.tensor([1, 2])).sample
        half = unet.to(dtype)(noisy, sigma, torch.tensor([1, 2])).sample
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.1 * sigma  # images themselves round to 0.004 in bfloat16


def test_saved_pipeline_draws_the_same(tmp_path):
    pipeline = edm_pipeline(CMStochasticIterativeScheduler(), noised_classifier(), preconditioning="consistency")
    pipeline.save_pretrained(tmp_path)
    drawn = draw(pipeline, num_inference_steps=2)
    loaded = (
        ClassifierGuidedPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    )
    for one in loaded:
        one.set_progress_bar_config(disable=True)
        assert torch.equal(draw(one, num_inference_steps=2), drawn)


@pytest.mark.parametrize(
    "scheduler, call, message",
    [
        (HeunDiscreteScheduler(), {"num_inference_steps": 0}, "`num_inference_steps` must be an integer in"),
        (HeunDiscreteScheduler(), {"timesteps": [22, 0]}, "`timesteps` requires CMStochasticIterativeScheduler"),
        (HeunDiscreteScheduler(), {"timestep_respacing": "4"}, "`timestep_respacing` requires CMStoch"),
        (HeunDiscreteScheduler(), {"eta": 0.5}, "`eta` requires DDIMScheduler"),
        (HeunDiscreteScheduler(), {"churn": {"s_chrun": 8}}, "`churn` takes the options .* but got"),
        (HeunDiscreteScheduler(), {"churn": {"s_churn": -1}}, "`s_churn` of churn must be a number of at least 0"),
        (HeunDiscreteScheduler(), {"churn": 8}, "`churn` must be a Churn or a dict"),
        (
            EulerAncestralDiscreteScheduler(),
            {"churn": {"s_churn": 8}},
            "`churn` must not be given with EulerAncestral",
        ),
        (CMStochasticIterativeScheduler(), {"churn": {"s_churn": 8}}, "`churn` must not be given with CMStoch"),
        (CMStochasticIterativeScheduler(), {"epsilon_scale": 1.01}, "`epsilon_scale` is not supported with CMStoch"),
        (CMStochasticIterativeScheduler(40), {"timesteps": [40, 0]}, r"such as \[20, 0\] or '0,20,39'"),
        (EDMDPMSolverMultistepScheduler(), {"churn": {"s_churn": 8}}, "`churn` must not be given with EDMDPMSolver"),
        (
            HeunDiscreteScheduler(),
            {"sigmas": [100.0, 1.0]},
            "must be between 0.002 and 80, the noise levels of the UNet",
        ),
        (
            HeunDiscreteScheduler(),
            {"churn": {"s_churn": 8}, "restart": {"sigma_min": 1, "sigma_max": 9}},
            "if `eta` or `churn` adds noise",
        ),
        (
            EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
            {"restart": {"sigma_min": 1, "sigma_max": 9}},
            "not supported with EDMDPMSolverMultistepScheduler, whose steps add noise",
        ),
        (
            CMStochasticIterativeScheduler(),
            {"restart": {"sigma_min": 1, "sigma_max": 9}},
            "whose steps all lead to x_0",
        ),
        (CMStochasticIterativeScheduler(), {"sigmas": [9.0, 1.0, 9.0, 1.0]}, "`sigmas` must go down with CMStoch"),
        (CMStochasticIterativeScheduler(), {"timesteps": [22, 0], "sigmas": [80.0, 1.0]}, "both list the steps"),
        (
            EDMDPMSolverMultistepScheduler(final_sigmas_type="sigma_min", sigma_min=0.5),
            {"sigmas": [10.0, 0.3]},
            "`sigmas` must be above 0.5, where the run of this EDMDPMSolverMultistepScheduler ends",
        ),
        (CMStochasticIterativeScheduler(sigma_max=90.0), {}, "sigma_max=80, but got 0.002 and 90"),
        (CMStochasticIterativeScheduler(sigma_min=0.01), {}, "sigma_min=0.002 and sigma_max=80, but got 0.01 and 80"),
        (EDMEulerScheduler(sigma_min=0.001), {}, "The noise levels of EDMEulerScheduler must be those of the UNet"),
        (EDMDPMSolverMultistepScheduler(sigma_max=99.0), {}, "must be those of the UNet, .* but got 0.002 and 99"),
        (CMStochasticIterativeScheduler(), {"timesteps": [0, 22]}, "timesteps=.0, 22. must be steps of"),
        (CMStochasticIterativeScheduler(), {"timesteps": [22]}, "that include 0, the highest noise level"),
        (CMStochasticIterativeScheduler(), {"timesteps": 3}, "timesteps=3 must be steps of"),
        (CMStochasticIterativeScheduler(), {"timestep_respacing": "0,x"}, "timestep_respacing='0,x' must be steps"),
        (CMStochasticIterativeScheduler(), {"timestep_respacing": "0,40,50"}, "different integers below 40"),
    ],
)
def test_calls_that_cannot_be_sampled_are_refused(scheduler, call, message):
    with pytest.raises(ValueError, match=message):
        draw(edm_pipeline(scheduler), **call)


def test_a_classifier_that_would_be_told_noise_levels_is_refused():
    classifier = noised_classifier()
    with pytest.raises(ValueError, match="guidance_fn=ClassifierGuidance.*requires a UNet that is given timesteps"):
        draw(edm_pipeline(classifier=classifier), guidance_scale=5.0, guidance_fn=ClassifierGuidance(classifier))


def test_parts_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="requires a model that predicts the noise"):
        edm_unet().epsilon_view()
    with pytest.raises(ValueError, match="DDIMScheduler is not supported for a UNet with preconditioning"):
        edm_pipeline(DDIMScheduler())
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler must be at least 2, .* but got 1"):
        edm_pipeline(CMStochasticIterativeScheduler(num_train_timesteps=1))
    with pytest.raises(ValueError, match="requires a `solver_order` of 1 or 2, but got 3"):
        edm_pipeline(EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3))
    with pytest.raises(ValueError, match="EDMEulerScheduler is not supported"):
        tiny_pipeline(scheduler=EDMEulerScheduler())
    with pytest.raises(ValueError, match="classifier's config must have num_train_timesteps and beta_schedule"):
        edm_pipeline(classifier=tiny_classifier())
    with pytest.raises(ValueError, match="`weaker` must have the preconditioning of the UNet"):
        draw(edm_pipeline(), cfg_weight=1.0, weaker=tiny_unet())
    with pytest.raises(ValueError, match="`churn` requires HeunDiscreteScheduler or EulerDiscreteScheduler"):
        draw(tiny_pipeline(), num_inference_steps=2, churn={"s_churn": 8})
    for method, call in (("predict", (images(), 3, [1, 2])), ("invert", (images(), [1, 2]))):
        with pytest.raises(ValueError, match=f"`{method}` requires a UNet that is given timesteps"):
            getattr(edm_pipeline(), method)(*call)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"preconditioning": "vp"}, "`preconditioning` must be one of .* but got 'vp'"),
        ({"out_channels": 6}, "requires out_channels=3"),
        ({"sigma_data": 0.0}, "`sigma_data` must be positive"),
        ({"sigma_min": 80.0}, "`sigma_min` and `sigma_max` must be positive and finite"),
    ],
)
def test_preconditioning_that_is_none_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        edm_unet(**config)
