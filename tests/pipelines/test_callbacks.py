"""Callbacks at the end of a step, interruption and the progress bar."""

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from pipeline_calls import SCALE, STEPS, differ, draw, every_solver, rows_seen, seeded, solver_pipeline, visited
from tiny_models import images, tiny_pipeline, tiny_scheduler, tiny_unet


@every_solver
def test_callback_sees_the_latents_after_each_step(solver):
    pipeline, call = solver_pipeline(solver)
    seen = []

    def callback(called, step, timestep, kwargs):
        assert called is pipeline and set(kwargs) == {"latents"}
        seen.append((step, int(timestep), kwargs["latents"].clone()))
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback, **call)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == visited(pipeline, **call)
    assert torch.equal(seen[-1][2], output)
    assert differ(seen[0][2], seen[1][2])


@every_solver
def test_callback_changes_the_latents(solver):
    pipeline, call = solver_pipeline(solver)

    def zero_at(changed):
        def callback(_, step, timestep, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == changed else {}

        return draw(pipeline, callback_on_step_end=callback, **call)

    assert not zero_at(STEPS - 1).any()
    assert zero_at(0).any() and differ(zero_at(0), draw(pipeline, **call))


DETERMINISTIC = [
    (DDIMScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (DPMSolverSinglestepScheduler, {"solver_order": 3}),
    (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (UniPCMultistepScheduler, {}),
    (UniPCMultistepScheduler, {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    (DEISMultistepScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (EulerDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
    (KDPM2DiscreteScheduler, {}),
]


OLD_METHODS = pytest.mark.filterwarnings("ignore:.*dpmsolver.* is deprecated:FutureWarning")


@OLD_METHODS
@pytest.mark.parametrize("when", ["callback_on_step_start", "callback_on_step_end"])
@pytest.mark.parametrize(("scheduler_class", "options"), DETERMINISTIC)
def test_no_solver_undoes_a_change_of_the_latents(scheduler_class, options, when):
    check_changes(tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **options)), when)


@OLD_METHODS
@pytest.mark.parametrize(
    "scheduler_class", [EulerDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler]
)
def test_entries_of_other_schedulers_in_the_config_mean_nothing(scheduler_class):
    end = {"final_sigmas_type": "sigma_min"}
    for first, options in (
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}),
        (UniPCMultistepScheduler, {"predict_x0": False}),
    ):
        if first is not scheduler_class:
            config = {**first(**options, **end).config, **tiny_scheduler(DDIMScheduler).config}
            scheduler = scheduler_class.from_config(config, **end)
            check_changes(tiny_pipeline(scheduler=scheduler), "callback_on_step_end")


@pytest.mark.parametrize("timesteps", [[800, 600, 300, 100], [800, 400, 800, 400, 100], [800, 400, 400, 100]], ids=str)
@pytest.mark.parametrize("scheduler_class", [UniPCMultistepScheduler, SASolverScheduler, HeunDiscreteScheduler])
def test_callback_that_changes_nothing_changes_nothing(scheduler_class, timesteps):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))

    def callback(_, step, timestep, kwargs):
        return {"latents": kwargs["latents"].clone()}

    both = {"callback_on_step_start": callback, "callback_on_step_end": callback}
    call = {"timesteps": timesteps, "num_inference_steps": None}
    torch.testing.assert_close(draw(pipeline, **call, **both), draw(pipeline, **call), rtol=0, atol=0)


def test_heuns_method_with_preconditioning_does_not_undo_a_change_of_the_latents():
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    pipeline = tiny_pipeline(unet, HeunDiscreteScheduler(), with_classifier=False)
    check_changes(pipeline, "callback_on_step_end")


def check_changes(pipeline, when):
    """If the predicted x_0 stays the same, a change shrinks as the noise does."""

    def steps_of(changed=None, in_place=False):
        def callback(_, step, timestep, kwargs):
            if step != changed:
                return {}
            latents = kwargs["latents"]
            return {"latents": latents.add_(0.1) if in_place else latents + 0.1}

        call = {"x_0_fn": lambda x_0, timestep: torch.full_like(x_0, 0.3), when: callback, "generator": seeded()}
        return list(pipeline.steps([1, 3], num_inference_steps=6, guidance_scale=0.0, output_type="latent", **call))

    plain = steps_of()
    levels = [step.sigma / (1 + step.sigma**2) ** 0.5 for step in plain]  # sqrt(1 - alpha_bar)
    for place in range(len(plain) - 1):
        changed = place if when == "callback_on_step_start" else place - 1
        if changed >= 0:
            change = steps_of(changed, in_place=place % 2 == 1)[place].latents - plain[place].latents
            expected = 0.1 * levels[place + 1] / levels[place]
            torch.testing.assert_close(change, torch.full_like(change, expected), rtol=5e-3, atol=5e-4)


@every_solver
def test_scale_that_a_callback_changes_takes_effect_at_the_next_step(solver):
    pipeline, call = solver_pipeline(solver)
    trail = {}

    def run(name, change):
        trail[name] = []

        def callback(called, step, timestep, kwargs):
            trail[name].append(kwargs["latents"].clone())
            if step == 1 and change is not None:
                called._guidance_scale = change
            return kwargs

        return draw(pipeline, callback_on_step_end=callback, num_inference_steps=4, **call)

    rows = rows_seen(pipeline.classifier)
    run("plain", None)
    assert pipeline.guidance_scale == SCALE and rows == [2] * 4
    run("stopped", 0.0)
    assert pipeline.guidance_scale == 0.0 and rows == [2] * (4 + 2)
    assert all(torch.equal(a, b) for a, b in zip(trail["plain"][:2], trail["stopped"][:2], strict=True))
    assert differ(trail["plain"][2], trail["stopped"][2])
    run("one image", [0.0, SCALE])
    assert rows == [2] * (4 + 2 + 2) + [1] * 2
    assert torch.equal(run("again", None), trail["plain"][-1]), "the change lasted beyond its call"


def test_scale_that_a_callback_changes_in_place_is_changed_for_this_run_alone():
    pipeline, given = tiny_pipeline(), torch.tensor([SCALE, SCALE])
    rows = rows_seen(pipeline.classifier)

    def stop(called, step, timestep, kwargs):
        called._guidance_scale *= 0
        return kwargs

    draw(pipeline, guidance_scale=given, callback_on_step_end=stop, num_inference_steps=3)
    assert rows == [2] and given.tolist() == [SCALE, SCALE]


def test_interruption_skips_the_steps_that_are_left():
    pipeline = tiny_pipeline()
    steps, latents = rows_seen(pipeline.unet), []

    def callback(called, step, timestep, kwargs):
        latents.append(kwargs["latents"])
        called._interrupt = step == 1
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback)
    assert len(steps) == 2 and torch.equal(output, latents[-1])
    assert pipeline.interrupt
    draw(pipeline)
    assert not pipeline.interrupt and len(steps) == 2 + STEPS


def test_a_run_that_stops_before_noise_is_added_returns_its_last_step():
    unet = tiny_unet(out_channels=3, preconditioning="consistency")
    consistency = tiny_pipeline(unet, CMStochasticIterativeScheduler(), with_classifier=False)
    jumping = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    jumps = {"timesteps": [500, 0, 500, 0], "num_inference_steps": None}
    for pipeline, last, call in ((consistency, 0, {}), (jumping, 1, jumps)):
        latents = []

        def stop(called, step, timestep, kwargs, latents=latents, last=last):
            latents.append(kwargs["latents"])
            called._interrupt = step == last
            return kwargs

        output = draw(pipeline, callback_on_step_end=stop, guidance_scale=0.0, **call)
        assert torch.equal(output, latents[-1]) and len(latents) == last + 1


def test_a_dict_that_is_returned_again_acts_again():
    pipeline, latents = tiny_pipeline(), images()
    kept = {"latents": latents}
    drawn = draw(pipeline, num_inference_steps=3, guidance_scale=0.0, callback_on_step_end=lambda *_: kept)
    assert torch.equal(drawn, latents) and kept["latents"] is latents


def test_callback_is_given_only_what_it_asks_for():
    pipeline = tiny_pipeline()
    seen = []
    draw(
        pipeline,
        callback_on_step_end=lambda *args: seen.append(args[3]) or {},
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * STEPS
    assert pipeline._callback_tensor_inputs == ["latents", "x_0", "gradient", "log_probabilities"]
    with pytest.raises(ValueError, match=r"among .*'latents'.*, but got \['noise'\]"):
        draw(pipeline, callback_on_step_end_tensor_inputs=["noise"])


def test_progress_bar_counts_the_steps_and_can_be_switched_off(capfd):
    pipeline = tiny_pipeline()
    draw(pipeline)
    assert capfd.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="drawing")
    draw(pipeline, timestep_respacing="6")
    shown = capfd.readouterr().err
    assert "drawing" in shown and "6/6" in shown
