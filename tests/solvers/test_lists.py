"""Lists of timesteps and noise levels, jumps back, Restart and churn, held to theory by a mixture of Gaussians."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from gaussian_mixture import MIXTURE, fitted_order, start
from pipeline_calls import draw, refused
from tiny_models import tiny_pipeline, tiny_scheduler

from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.guidance import guidance_gradient
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS, DDPMSolver, build_solver


LINEAR = {"beta_start": 1e-4, "beta_end": 0.02}  # the default of some schedulers is another
TRAINED = NoiseSchedule.from_config(tiny_scheduler(**LINEAR).config)
WITHOUT_NOISE = [
    (DDIMScheduler, 1, {}),
    (EulerDiscreteScheduler, 1, {}),
    (DPMSolverMultistepScheduler, 2, {}),
    (DPMSolverSinglestepScheduler, 2, {}),
    (UniPCMultistepScheduler, 2, {}),
    (DEISMultistepScheduler, 2, {}),
    (HeunDiscreteScheduler, 2, {}),
    (KDPM2DiscreteScheduler, 2, {}),
]
deterministic = pytest.mark.parametrize(("scheduler_class", "order", "options"), WITHOUT_NOISE)


def solver_of(scheduler_class, steps=None, eta=0.0, churn=None, restart=None, timesteps=None, sigmas=None, **options):
    scheduler = tiny_scheduler(scheduler_class, **LINEAR, **options)
    solver = build_solver(scheduler, steps, None, eta, timesteps, sigmas, churn, restart)
    solver.clip_range = None
    return solver


def states(solver, x: torch.Tensor, component: int | None = None) -> list[torch.Tensor]:
    """x_t at each evaluation of a run on the mixture, and its end."""
    generator = torch.Generator().manual_seed(1)
    found, alpha_bars = [solver.begin(x, generator)], solver.schedule.alpha_bar.tolist()
    for step, index in enumerate(solver.visits):
        x = found[-1]
        alpha_bar = alpha_bars[index]
        model_output = MIXTURE.epsilon(x, alpha_bar)
        if isinstance(solver, DDPMSolver):
            model_output = torch.cat([model_output, torch.zeros_like(model_output)], dim=1)
        denoised = solver.predict(model_output, index, x)
        gradient = None
        if component is not None:

            def posterior(x_t, *_, alpha_bar=alpha_bar):
                return MIXTURE.log_posterior(x_t, alpha_bar, component)

            gradient = guidance_gradient(posterior, x, torch.zeros(len(x)), denoised.x_0, None)
        found.append(solver.renoise(solver.step(denoised, index, x, gradient, generator), step, generator))
    return found


def uneven(count: int, highest: float = 150.0, lowest: float = 0.1) -> list[float]:
    """Noise levels that are spaced unevenly, but smoothly."""
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    places = places + 0.1 * torch.sin(2 * math.pi * places)
    return (math.log(highest) + places * math.log(lowest / highest)).exp().tolist()


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_listed_steps_of_the_scheduler_draw_what_the_scheduler_draws(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **LINEAR))
    solver = build_solver(pipeline.scheduler, 4, None, 0.0)
    steps = sorted(set(solver.schedule.timesteps.round().int().tolist()), reverse=True)
    if scheduler_class is KDPM2DiscreteScheduler:  # every second evaluation is between two steps
        steps = solver.schedule.timesteps.flip(0)[::2].round().int().tolist()
    expected = draw(pipeline, num_inference_steps=4, guidance_scale=0.0)
    for listed in ({"timesteps": steps}, {"sigmas": TRAINED.sigma[steps].tolist()}):
        found = draw(pipeline, guidance_scale=0.0, **listed)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)  # rounding at noise level 157


@deterministic
def test_solvers_converge_at_their_order_over_any_levels(scheduler_class, order, options):
    steps, errors = [20, 40, 80], []
    for count in steps:
        solver = solver_of(scheduler_class, sigmas=uneven(count), **options)
        alpha_bars = solver.schedule.alpha_bar.tolist()
        *_, found, _ = states(solver, start(), component=1)
        expected = MIXTURE.conditional_end(start().double(), alpha_bars[-1], alpha_bars[0], 1)
        errors.append((found - expected).square().mean().sqrt().item())
    assert fitted_order(steps, errors) > order - 0.3, errors
    assert errors[-1] < 0.03


def check_distribution(pixels: torch.Tensor) -> None:
    second = pixels > sum(MIXTURE.means) / 2
    # 10,000 pixels: the share's standard error is 0.005; the rest is for the error of the steps.
    assert second.double().mean().item() == pytest.approx(MIXTURE.weights[1], abs=0.03)
    assert pixels[second].mean().item() == pytest.approx(MIXTURE.means[1], abs=0.02)
    assert pixels[second].std().item() == pytest.approx(MIXTURE.spread, abs=0.02)


@pytest.mark.parametrize(
    ("scheduler_class", "options"),
    [
        (DDPMScheduler, {}),
        (DDIMScheduler, {"eta": 1.0}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (KDPM2AncestralDiscreteScheduler, {}),
        (SASolverScheduler, {}),
    ],
)
def test_stochastic_solvers_draw_the_distribution_over_any_levels_and_jumps(scheduler_class, options):
    levels = uneven(150, lowest=0.02)
    solver = solver_of(scheduler_class, sigmas=[*levels[:100], *levels[60:]], **options)
    *_, found, _ = states(solver, start(1, 100))
    check_distribution(found / solver.schedule.signal_scale[0].item())


def test_unet_is_told_timesteps_between_those_of_training():
    pipeline, told = tiny_pipeline(scheduler=tiny_scheduler(HeunDiscreteScheduler, **LINEAR)), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: told.append(args[1][0].item()))
    between = (TRAINED.sigma[500] * TRAINED.sigma[501]).sqrt().item()
    draw(pipeline, sigmas=[TRAINED.sigma[999].item(), between, TRAINED.sigma[0].item()], guidance_scale=0.0)
    assert told == pytest.approx([999, 500.5, 500.5, 0, 0], abs=1e-3)


@deterministic
def test_restart_adds_noise_and_begins_afresh(scheduler_class, order, options):
    """Multistep methods forget what they knew before the jump, two-stage methods jump between two steps."""
    levels = uneven(12)
    part = {"sigma_min": levels[8], "sigma_max": levels[4], "times": 2}
    solver = solver_of(scheduler_class, sigmas=levels, restart=part, **options)
    found = states(solver, start(), component=1)
    jumps = [step for step in range(len(solver.visits)) if solver.jumps_to(step)]
    sigmas = [round(solver.sigmas[step], 9) for step in range(len(found) - 1)]
    assert [sigmas[step] for step in jumps] == pytest.approx([levels[4]] * 2)
    assert len(jumps) == 2 and sigmas.count(sigmas[jumps[0]]) >= 3
    tail = solver_of(scheduler_class, sigmas=levels[4:], **options)
    expected = states(tail, found[jumps[-1]], component=1)
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-6, atol=1e-6)
    # Without restarts, the run up to the jump is the same.
    plain = states(solver_of(scheduler_class, sigmas=levels, **options), start(), component=1)
    assert torch.equal(plain[jumps[0] - 1], found[jumps[0] - 1]) and not torch.equal(plain[-1], found[-1])


@deterministic
def test_restart_forgets_a_wrong_start(scheduler_class, order, options):
    """The noise of a restart is that of the forward process, so that x_t of a wrong distribution becomes one of the right."""
    wrong, levels = torch.full((1, 1, 100, 100), 2.0), uneven(60, lowest=0.02)
    plain = states(solver_of(scheduler_class, sigmas=levels, **options), wrong)[-1]
    assert plain.std() < 1e-3
    part = {"sigma_min": 0.2, "sigma_max": 20.0, "times": 2}
    check_distribution(states(solver_of(scheduler_class, sigmas=levels, restart=part, **options), wrong)[-1])


@pytest.mark.parametrize("scheduler_class", [HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_churn_forgets_a_wrong_start(scheduler_class):
    wrong, levels = torch.full((1, 1, 100, 100), 2.0), uneven(120, lowest=0.02)
    solver = solver_of(scheduler_class, sigmas=levels, churn={"s_churn": 60, "s_tmin": 0.1})
    check_distribution(states(solver, wrong)[-1])


def test_churn_of_0_is_heuns_method_and_no_churn_exceeds_the_noise_of_training():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(HeunDiscreteScheduler, **LINEAR))
    plain = draw(pipeline)
    assert torch.equal(draw(pipeline, churn={"s_churn": 0, "s_noise": 2}), plain)
    highest = TRAINED.sigma[-1].item()
    solver = solver_of(HeunDiscreteScheduler, 8, churn={"s_churn": 100})
    assert max(solver.sigmas) == pytest.approx(highest) and solver.sigmas[1] == pytest.approx(
        solver.sigmas[2] / 2**0.5
    )
    assert solver.schedule.timesteps.max() <= 999
    # Without room for churn, as at s_tmin above all levels, it is the same method in other words.
    torch.testing.assert_close(draw(pipeline, churn={"s_churn": 9, "s_tmin": 1e3}), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler_class", [DEISMultistepScheduler, SASolverScheduler])
@pytest.mark.parametrize("steps", [{"timesteps": [900, 500, 0]}, {"sigmas": [50.0, 1.0, 0.01]}])
def test_a_list_may_end_where_the_scheduler_ends(scheduler_class, steps):
    """The lowest noise level of these schedulers is that of timestep 0, but rounded."""
    solver = solver_of(scheduler_class, **steps)
    assert len(solver.visits) == 3 and states(solver, start())[-1].isfinite().all()


def test_no_gradient_is_reused_across_a_jump():
    pipeline, seen = tiny_pipeline(), []
    pipeline.classifier.register_forward_pre_hook(lambda _, args: seen.append(int(args[1][0])))
    draw(pipeline, timesteps=[300, 200, 100, 300, 200, 100, 0], guidance_options={"every": 2})
    assert seen == [300, 100, 300, 100]


@pytest.mark.parametrize(
    ("scheduler_class", "call", "said"),
    [
        (DDIMScheduler, {"sigmas": [200.0, 1.0]}, "must be between 0.01 and 157.4, the noise levels of the UNet"),
        (DDIMScheduler, {"sigmas": [1.0, 0.0]}, "one or more positive numbers, without the end"),
        (DDIMScheduler, {"sigmas": ["1"]}, "one or more positive numbers"),
        (DDIMScheduler, {"sigmas": []}, "one or more positive numbers"),
        (DDIMScheduler, {"sigmas": [1.0, 2.0, 1.0]}, "must begin with the noisiest one, 2.0"),
        (DDIMScheduler, {"timesteps": [10, 999, 10, 0]}, "must begin with the noisiest one, 999"),
        (DDIMScheduler, {"sigmas": [2.0, 1.00001, 1.0]}, "must differ by 0.01 %"),
        (DDIMScheduler, {"sigmas": [2.0], "timesteps": [3]}, "both list the steps"),
        (UniPCMultistepScheduler, {"timesteps": [900, 300, 600, 300]}, "skip an entry"),
        (
            DEISMultistepScheduler,
            {"timesteps": [900, 300, 900, 300]},
            "DEISMultistepScheduler ends at noise level 0.01",
        ),
        (
            PNDMScheduler,
            {"timesteps": [900, 600, 900, 600, 300]},
            "must go down with PNDMScheduler, which takes its first step twice",
        ),
        (
            DPMSolverSinglestepScheduler,
            {"timesteps": [900, 600, 900, 600]},
            "must go down with DPMSolverSinglestepScheduler, whose steps are groups",
        ),
        (DDPMScheduler, {"timestep_respacing": "3", "restart": {"sigma_min": 1, "sigma_max": 9}}, "add noise already"),
        (
            SASolverScheduler,
            {"restart": {"sigma_min": 1, "sigma_max": 9}},
            "not supported with SASolverScheduler, whose steps add noise already",
        ),
        (
            PNDMScheduler,
            {"restart": {"sigma_min": 1, "sigma_max": 9}},
            "not supported with PNDMScheduler, which takes its first step twice",
        ),
        (
            DDIMScheduler,
            {"eta": 1.0, "restart": {"sigma_min": 1, "sigma_max": 9}},
            "adds noise in each step. Leave out either",
        ),
        (DDIMScheduler, {"restart": {"sigma_min": 1, "sigma_max": 1.1}}, "two or more noise levels of the run"),
        (DDIMScheduler, {"restart": {"sigma_min": 2, "sigma_max": 1}}, "0 <= sigma_min < sigma_max"),
        (DDIMScheduler, {"restart": {"sigma_min": 0, "sigma_max": 1, "times": 0}}, "`times` of restart"),
        (DDIMScheduler, {"restart": {"sigma_max": 1}}, "must be a Restart, a dict of its options"),
        (DDIMScheduler, {"restart": 3}, "must be a Restart, a dict of its options"),
        (
            DDIMScheduler,
            {"timesteps": [900, 600, 900, 600], "restart": {"sigma_min": 0, "sigma_max": 99}},
            "`restart` requires `timesteps` that only go down",
        ),
        (DPMSolverMultistepScheduler, {"churn": {"s_churn": 4}}, "`churn` requires HeunDiscreteScheduler or Euler"),
    ],
)
def test_steps_that_cannot_be_taken_are_refused(scheduler_class, call, said):
    refused(tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **LINEAR)), said, **call)
