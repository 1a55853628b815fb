"""Steps of a run: the visited timesteps, and each solver's use of x_0."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from pipeline_calls import SCALE, SOLVERS, differ, draw, every_solver, refused, solver_pipeline, visited
from tiny_models import SIZE, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.solvers import GUIDED_SETTINGS


def test_steps_that_are_not_given_are_the_saved_default():
    pipeline = tiny_pipeline(num_inference_steps=3)
    assert visited(pipeline, num_inference_steps=None) == [999, 500, 0]
    assert tiny_pipeline().config.num_inference_steps == 250
    respaced = tiny_pipeline(timestep_respacing="ddim4")
    assert visited(respaced, num_inference_steps=None) == [750, 500, 250, 0]
    assert visited(respaced, num_inference_steps=2) == [999, 0]


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_respacing_wins_over_the_number_of_steps_with_either_kind_of_string(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    for respacing, expected in {
        "3": [999, 500, 0],
        "ddim4": [750, 500, 250, 0],
        "2,1": [500, 499, 0],
    }.items():
        assert visited(pipeline, timestep_respacing=respacing, num_inference_steps=7) == expected
        assert pipeline.num_timesteps == len(expected)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_empty_respacing_takes_all_steps(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=7))
    assert visited(pipeline, timestep_respacing="") == [6, 5, 4, 3, 2, 1, 0]


def test_number_of_steps_on_ddim_is_an_integer_stride_where_one_gives_it():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    assert visited(pipeline, num_inference_steps=5) == [800, 600, 400, 200, 0]
    assert visited(pipeline, num_inference_steps=7) == list(range(0, 1000, 143))[::-1]
    # 101 steps: a stride of 9 gives 112, one of 10 gives 100.
    expected = [round(i * 1000 / 101) for i in range(101)]
    assert visited(pipeline, num_inference_steps=101) == expected[::-1]
    assert visited(pipeline, num_inference_steps=1) == [999]  # not 0, where x_T would count as a clean image


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_number_of_training_timesteps_need_not_be_1000(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=90))
    assert visited(pipeline, num_inference_steps=3) == (
        [89, 44, 0] if scheduler_class is DDPMScheduler else [60, 30, 0]
    )
    assert visited(pipeline, num_inference_steps=90) == list(range(90))[::-1]
    with pytest.raises(ValueError, match=r"must be an integer in \[1, 90\].*=91"):
        draw(pipeline, num_inference_steps=91)


def test_scheduler_without_respacing_places_its_own_steps():
    for scheduler_class in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        scheduler = tiny_scheduler(scheduler_class)
        stock = scheduler_class.from_config(scheduler.config)
        stock.set_timesteps(5)
        assert visited(tiny_pipeline(scheduler=scheduler), num_inference_steps=5) == stock.timesteps.tolist()


@every_solver
def test_every_solver_takes_one_step_and_many(solver):
    pipeline, call = solver_pipeline(solver)
    for steps in (1, 2, 11):
        output = draw(pipeline, num_inference_steps=steps, **call)
        assert output.isfinite().all()
        assert pipeline.num_timesteps == steps


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_unguided_multistep_solver_without_clipping_is_the_stock_one(scheduler_class, karras):
    # There is no clipping in the stock class, nor does it know what to do with a learned variance.
    unet = tiny_unet()
    scheduler = tiny_scheduler(scheduler_class, use_karras_sigmas=karras)
    reference = scheduler_class.from_config(scheduler.config)
    scheduler.register_to_config(clip_sample=False)
    latents = expected = images(2)
    output = draw(tiny_pipeline(unet, scheduler), latents=latents, guidance_scale=0, num_inference_steps=6)
    reference.set_timesteps(6)
    with torch.no_grad():
        for timestep in reference.timesteps:
            epsilon = unet(expected, timestep, torch.tensor([1, 3])).sample[:, :3]
            expected = reference.step(epsilon, timestep, expected).prev_sample
    assert (output - expected).abs().max() < 2e-4 * expected.abs().max()


# Every second value lies beyond the threshold, which is far above 1 where guidance is strong.
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 1e3}


@pytest.mark.parametrize("options", [{}, THRESHOLDING])
@pytest.mark.parametrize("guidance_scale", [0.0, SCALE])
def test_first_order_multistep_solver_without_clipping_is_ddim(guidance_scale, options):
    # DPM-Solver++ of first order takes DDIM's steps (Lu et al. 2022, section 4), on the same timesteps.
    unet, call = tiny_unet(), {"latents": images(2), "guidance_scale": guidance_scale}
    call["guidance_options"] = {"max_x_0_shift": None}  # the default of DDIM alone
    scheduler = tiny_scheduler(DPMSolverMultistepScheduler, solver_order=1, timestep_spacing="leading", **options)
    scheduler.register_to_config(clip_sample=False)
    multistep = tiny_pipeline(unet, scheduler)
    ddim = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler, clip_sample=False, **options))
    timesteps = [800, 600, 400, 200]
    assert visited(multistep, num_inference_steps=4) == visited(ddim, timestep_respacing="0,1,1,1,1") == timesteps
    expected = draw(ddim, timestep_respacing="0,1,1,1,1", **call)
    output = draw(multistep, num_inference_steps=4, **call)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "unipc"])
def test_dynamic_thresholding_scales_x_0_back_to_its_range(solver):
    # Each image's x_0 is clipped at a quantile of its size, at least 1, and divided by it (Saharia et al. 2022, arXiv
    # 2205.11487, section 2.3).
    scheduler_class, call = SOLVERS[solver]
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **THRESHOLDING))
    steps = {"timestep_respacing": "1"} if solver in ("ddpm", "ddim") else {"num_inference_steps": 1}
    (timestep,), latents = visited(pipeline, **steps), 4 * images(2)
    found = draw(pipeline, guidance_scale=0, latents=latents, **steps)
    with torch.no_grad():
        x_0 = pipeline.predict(latents, timestep, [1, 3]).x_0
    threshold = x_0.abs().flatten(1).quantile(0.5, dim=1).clamp(min=1)[:, None, None, None]
    assert (threshold > 1).any()
    torch.testing.assert_close(found, x_0.clamp(-threshold, threshold) / threshold, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", GUIDED_SETTINGS)
def test_what_authors_advise_keeps_strongly_guided_images_in_their_range(scheduler_class):
    advised = scheduler_class.from_config(tiny_scheduler().config, **GUIDED_SETTINGS[scheduler_class])
    assert dict(advised.config) | GUIDED_SETTINGS[scheduler_class] == dict(advised.config)
    call = {"guidance_scale": 1e4, "num_inference_steps": 6}
    found = draw(tiny_pipeline(scheduler=advised), **call)
    assert 0.5 < found.abs().max() <= 1 + 1e-4
    assert draw(tiny_pipeline(scheduler=tiny_scheduler(scheduler_class)), **call).abs().max() > 1.01


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_schedulers_that_cannot_threshold_clip_whatever_they_were_made_of(scheduler_class):
    advised = DPMSolverMultistepScheduler.from_config(
        tiny_scheduler().config, **GUIDED_SETTINGS[DPMSolverMultistepScheduler]
    )
    pipeline = tiny_pipeline(scheduler=scheduler_class.from_config(advised.config))
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6, latents=4 * images(2)).abs().max() <= 1 + 1e-4


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
def test_x_0_is_clipped_before_guidance_and_never_after(solver):
    scheduler_class, call = SOLVERS[solver]
    # The last step returns x_0: without guidance it is within the range, and guidance moves it out. Strong guidance from
    # t = 500 in one step shows it on DDIM, whose last step is otherwise from t = 0, where there is hardly any noise.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    if solver == "ddim":
        assert pipeline.scheduler.config.clip_sample and pipeline.scheduler.config.clip_sample_range == 1.0
    plain = draw(pipeline, guidance_scale=0, num_inference_steps=6)
    assert plain.abs().max() <= 1 + 1e-4
    steps = {"timestep_respacing": "0,1"} if solver == "ddim" else {"num_inference_steps": 6}
    assert draw(pipeline, guidance_scale=1e4, **steps).abs().max() > 1.01
    pipeline.scheduler.register_to_config(clip_sample=False)  # read at each call
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6).abs().max() > 1.01
    pipeline.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.25)
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6).abs().max() <= 0.25 + 1e-4


def test_ddim_that_was_told_not_to_end_at_alpha_one_gives_numbers():
    # As configs of latent diffusion models say; its table is in float32, and ours in float64.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, set_alpha_to_one=False))
    assert draw(pipeline).isfinite().all()


def test_ddim_ends_at_the_least_noise_of_training_wherever_its_steps_end():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, set_alpha_to_one=False, clip_sample=False))
    found = draw(pipeline, timesteps=[300], guidance_scale=0.0, latents=images())
    predicted = pipeline.predict(images(), 300, [1, 3])
    alpha_bar = 1 - pipeline.scheduler.config.beta_start
    expected = alpha_bar**0.5 * predicted.x_0 + (1 - alpha_bar) ** 0.5 * predicted.epsilon
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_solver_that_would_stand_still_is_refused(scheduler_class):
    # As many steps as timesteps: the scheduler's spacing then visits one of them twice, which divides by zero.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=20))
    assert draw(pipeline, num_inference_steps=19).isfinite().all()
    refused(pipeline, "20", num_inference_steps=20)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_with_a_fixed_variance(variance_type):
    scheduler = tiny_scheduler(variance_type=variance_type)
    pipeline = tiny_pipeline(tiny_unet(out_channels=3), scheduler)
    output = draw(pipeline)
    assert output.shape == (2, 3, SIZE, SIZE) and output.isfinite().all()
    assert differ(output, draw(pipeline, guidance_scale=0))
    # A learned variance is not thrown away in silence.
    with pytest.raises(ValueError, match=variance_type):
        tiny_pipeline(tiny_unet(out_channels=6), scheduler)


def test_a_list_of_scales_is_as_long_as_the_batch():
    refused(tiny_pipeline(), "`guidance_scale` must have one number per image", guidance_scale=[SCALE])


@every_solver
def test_model_that_predicts_x_0(solver):
    scheduler_class, call = SOLVERS[solver]
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, prediction_type="sample"))
    assert draw(pipeline, **call).isfinite().all()


@every_solver
def test_call_changes_no_component(solver):
    pipeline, call = solver_pipeline(solver)
    scheduler = pipeline.scheduler

    def state():
        tables = {name: value for name, value in vars(scheduler).items() if torch.is_tensor(value)}
        others = {name: repr(value) for name, value in vars(scheduler).items() if not torch.is_tensor(value)}
        return {name: value.clone() for name, value in tables.items()}, others, dict(scheduler.config)

    tables, others, config = state()
    flags = [parameter.requires_grad for parameter in pipeline.classifier.parameters()]
    pipeline.classifier.train()
    draw(pipeline, **call)
    tables_after, others_after, config_after = state()
    assert config == config_after and others == others_after and set(tables) == set(tables_after)
    assert all(torch.equal(tables[name], tables_after[name]) for name in tables)
    assert pipeline.scheduler is scheduler
    assert flags == [parameter.requires_grad for parameter in pipeline.classifier.parameters()]
    assert all(parameter.grad is None for parameter in pipeline.classifier.parameters())
    assert pipeline.classifier.training and not pipeline.unet.training
