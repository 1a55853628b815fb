"""Solvers held to theory: a mixture of Gaussians, whose noise and whose classes are known in closed form."""

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
from pipeline_calls import draw
from tiny_models import tiny_pipeline, tiny_scheduler

from diffusers_adm.diffusion import add_noise, epsilon_from_x_0
from diffusers_adm.guidance import guidance_gradient
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS, Denoised, build_solver


KARRAS = {"use_karras_sigmas": True}
# Scheduler, options, promised order.
ORDERS = {
    "DDIM": (DDIMScheduler, {}, 1),
    "Euler": (EulerDiscreteScheduler, KARRAS, 1),
    "DPM-Solver++ 1": (DPMSolverMultistepScheduler, {**KARRAS, "solver_order": 1}, 1),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, KARRAS, 2),
    "DPM-Solver++ 2S": (DPMSolverSinglestepScheduler, KARRAS, 2),
    "UniPC": (UniPCMultistepScheduler, KARRAS, 2),
    "DEIS": (DEISMultistepScheduler, KARRAS, 2),
    "Heun": (HeunDiscreteScheduler, KARRAS, 2),
    "DPM-Solver-2": (KDPM2DiscreteScheduler, KARRAS, 2),
    "PNDM": (PNDMScheduler, {}, 2),
    "SA-Solver without noise": (SASolverScheduler, {**KARRAS, "tau_func": lambda timestep: 0}, 2),
}


def run(scheduler_class: type, steps: int, x: torch.Tensor, component: int | None = None, generator=None, **options):
    """The state before the last step of a run on the mixture, and the alpha_bar of its start and of that state."""
    eta, skipped = options.pop("eta", 0.0), options.pop("skipped", 0.0)
    solver = build_solver(tiny_scheduler(scheduler_class, **options), steps, None, eta)
    solver.clip_range = None
    schedule = solver.schedule
    if skipped:
        entries = list(solver.entries)
        solver.begin_at(entries[int(skipped * len(entries))])
    alpha_bars = schedule.alpha_bar.tolist()
    end = max(index for index, alpha_bar in enumerate(alpha_bars) if alpha_bar == alpha_bars[0])
    for index in solver.visits[: solver.visits.index(end)]:
        alpha_bar = alpha_bars[index]
        model_output = MIXTURE.epsilon(x, alpha_bar)
        if scheduler_class is DDPMScheduler:
            model_output = torch.cat([model_output, torch.zeros_like(model_output)], dim=1)
        denoised = solver.predict(model_output, index, x)
        gradient = None
        if component is not None:

            def posterior(x_t, *_, alpha_bar=alpha_bar):
                return MIXTURE.log_posterior(x_t, alpha_bar, component)

            gradient = guidance_gradient(posterior, x, torch.zeros(len(x)), denoised.x_0, None)
        x = solver.step(denoised, index, x, gradient, generator)
    return x, alpha_bars[solver.visits[0]], alpha_bars[end]


@pytest.mark.parametrize(("guided", "skipped"), [(False, 0), (True, 0), (False, 0.5)])
@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_solvers_converge_at_their_order(name, guided, skipped):
    """This also holds for runs that begin in the middle of their steps, without the history of earlier steps."""
    scheduler_class, options, order = ORDERS[name]
    steps, errors = [20, 40, 80], []
    for count in steps:
        found, first, last = run(
            scheduler_class, count, start(), component=1 if guided else None, skipped=skipped, **options
        )
        # Guided at scale 1 by its own posterior, the mixture is the one component.
        expected = (
            MIXTURE.conditional_end(start().double(), first, last, 1)
            if guided
            else MIXTURE.fine_end(start(), first, last)
        )
        errors.append((found - expected).square().mean().sqrt().item())
    assert fitted_order(steps, errors) > order - 0.3, errors
    assert errors[-1] < 0.03


@pytest.mark.parametrize(
    ("scheduler_class", "options"),
    [
        (DDPMScheduler, {}),
        (DDIMScheduler, {"eta": 1.0}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
        (KDPM2AncestralDiscreteScheduler, {}),
        (SASolverScheduler, KARRAS),
    ],
)
@pytest.mark.parametrize("component", [None, 1])
def test_stochastic_solvers_draw_the_distribution(component, scheduler_class, options):
    generator = torch.Generator().manual_seed(1)
    pixels, _, last = run(scheduler_class, 300, start(1, 150), component, generator, **options)
    pixels = pixels / last**0.5  # at the lowest noise level
    second = pixels > (MIXTURE.means[0] + MIXTURE.means[1]) / 2
    share = second.double().mean().item()
    # 22,500 pixels: the share's standard error is 0.0033; the rest is for the error of 300 steps.
    assert share == pytest.approx(MIXTURE.weights[1] if component is None else 1.0, abs=0.03)
    assert pixels[second].mean().item() == pytest.approx(MIXTURE.means[1], abs=0.02)
    assert pixels[second].std().item() == pytest.approx(MIXTURE.spread, abs=0.015)


def test_every_supported_scheduler_draws_guided_and_unguided():
    for scheduler_class in SUPPORTED_SCHEDULERS:
        pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
        drawn = [
            pipeline(
                [1, 3],
                guidance_scale=scale,
                num_inference_steps=3,
                generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
                output_type="latent",
            ).images
            for scale in (0.0, 20.0)
        ]
        assert all(images.isfinite().all() for images in drawn), scheduler_class
        assert (drawn[0] - drawn[1]).abs().max() > 1e-3, scheduler_class
        alone = pipeline(
            [3],
            guidance_scale=20.0,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
        torch.testing.assert_close(alone[0], drawn[1][1], rtol=1e-3, atol=1e-3, msg=scheduler_class.__name__)


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_an_exact_prediction_leads_to_its_image_from_any_step(scheduler_class):
    """Noise that does not belong to the noise level of a step would stay in the image."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(2, 1, 4, 4, generator=generator) - 0.5
    count = len(build_solver(tiny_scheduler(scheduler_class), 9, None, 0.0).entries)
    for beginning in range(count):
        solver = build_solver(tiny_scheduler(scheduler_class), 9, None, 0.0)
        solver.begin_at(list(solver.entries)[beginning])
        x_t = add_noise(solver.schedule, x_0, solver.visits[0], torch.randn(x_0.shape, generator=generator))
        for step, index in enumerate(solver.visits):
            x_t = solver.renoise(x_t, step - 1, generator) if step else x_t
            output = epsilon_from_x_0(solver.schedule, x_t, index, x_0)
            if scheduler_class is DDPMScheduler:
                output = torch.cat([output, torch.zeros_like(output)], dim=1)
            x_t = solver.step(solver.predict(output, index, x_t), index, x_t, None, generator)
        torch.testing.assert_close(x_t, x_0, rtol=0, atol=0.06)  # DEIS and SA-Solver end at noise level 0.01


def x_0_of(scheduler) -> torch.Tensor:
    """x_0 of a guided run of a tiny pipeline."""
    return draw(tiny_pipeline(scheduler=scheduler), num_inference_steps=6, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("scheduler_class", "options"),
    [
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverMultistepScheduler, {"thresholding": True, "sample_max_value": 1.5}),
        (DPMSolverMultistepScheduler, KARRAS),
        (UniPCMultistepScheduler, {"disable_corrector": [0]}),
        (HeunDiscreteScheduler, KARRAS),
        (KDPM2DiscreteScheduler, KARRAS),
        (DDIMScheduler, {"clip_sample": False}),
        (DDIMScheduler, {"set_alpha_to_one": False}),
    ],
)
def test_options_that_are_changed_later_are_those_of_the_constructor(scheduler_class, options):
    changed = tiny_scheduler(scheduler_class)
    changed.register_to_config(**options)
    drawn = x_0_of(changed)
    assert torch.equal(drawn, x_0_of(tiny_scheduler(scheduler_class, **options)))
    assert not torch.equal(drawn, x_0_of(tiny_scheduler(scheduler_class)))


@pytest.mark.filterwarnings(
    "ignore:.* in one step, which oversaturates colours", "ignore:Guidance begins at noise level 20291"
)
def test_few_steps_over_all_noise_there_is_draw_numbers():
    """The error of a step from a sigma of thousands to a sigma of hundreds is rounding of float32."""
    for scheduler_class in SUPPORTED_SCHEDULERS:
        pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, beta_schedule="squaredcos_cap_v2"))
        for steps in (1, 2, 4):
            call = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
            images = pipeline([1], **call, output_type="latent").images
            assert images.isfinite().all(), (scheduler_class, steps)


@pytest.mark.parametrize("steps", [10, 334, 501])
def test_pndm_begins_where_there_is_nothing_but_noise_and_ends_where_there_is_none(steps):
    scheduler = tiny_scheduler(PNDMScheduler)
    solver = build_solver(scheduler, steps, None, 0.0)
    ddim = build_solver(tiny_scheduler(DDIMScheduler), steps, None, 0.0)
    assert sorted(set(solver.schedule.timesteps.tolist())) == ddim.schedule.timesteps.tolist()
    assert len(solver.schedule) == steps + 1
    # Told the same x_0 all the way, a run ends with it.
    x_0, x = torch.full((1, 1, 8, 8), 0.5), start()
    for index in reversed(range(len(solver.schedule))):
        x = solver.step(Denoised(x_0), index, x)
    torch.testing.assert_close(x, x_0, rtol=0, atol=2e-2)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_trailing_timesteps_are_those_of_diffusers(scheduler_class):
    scheduler = tiny_scheduler(scheduler_class, timestep_spacing="trailing")
    for steps in (1, 7, 10, 16, 999, 1000):
        scheduler.set_timesteps(steps)
        visited = build_solver(scheduler, steps, None, 0.0).schedule.timesteps.flip(0).tolist()
        assert sorted(set(visited)) == sorted(set(scheduler.timesteps.tolist()))
        assert visited[0] == 999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_sample_range": -1.0}, "`clip_sample_range` must be above 0, but got -1.0"),
        ({"sample_max_value": 0.0}, "`sample_max_value` must be above 0, but got 0.0"),
        ({"dynamic_thresholding_ratio": 1.5}, r"`dynamic_thresholding_ratio` must be in \[0, 1\], but got 1.5"),
    ],
)
def test_options_of_a_scheduler_that_draw_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_solver(tiny_scheduler(DDIMScheduler, **options), 4, None, 0.0)


@pytest.mark.parametrize(
    ("scheduler_class", "expected"), [(DDPMScheduler, [999, 666, 333, 0]), (DDIMScheduler, [750, 500, 250, 0])]
)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_other_spacings_leave_the_timesteps_of_the_original_code(scheduler_class, expected, spacing):
    solver = build_solver(tiny_scheduler(scheduler_class, timestep_spacing=spacing), 4, None, 0.0)
    assert solver.schedule.timesteps.flip(0).tolist() == expected
