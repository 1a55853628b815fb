"""Steps of a run, one at a time: they equal the steps of the call, and do not affect the code between them."""

import contextlib
import inspect
import threading

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from pipeline_calls import STEPS, draw, every_solver, rows_seen, seeded, solver_pipeline
from tiny_models import SIZE, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline


CALL = {"num_inference_steps": STEPS, "guidance_scale": 20.0, "output_type": "latent"}


def steps_of(pipeline, labels=(1, 3), **call):
    return pipeline.steps(list(labels), **{"generator": seeded(), **CALL, **call})


def tiny_upsampler() -> ADMUpsamplePipeline:
    unet = tiny_unet(in_channels=3, low_res_conditioning=True)
    return ADMUpsamplePipeline(unet, tiny_scheduler(), low_res_size=SIZE // 2)


@every_solver
def test_the_call_is_the_loop_over_its_steps(solver):
    pipeline, call = solver_pipeline(solver)
    steps, copies = [], []
    for step in steps_of(pipeline, **call):
        steps.append(step)
        copies.append(step.latents.clone())
    drawn = draw(pipeline, **call)
    assert torch.equal(steps[-1].latents, drawn) and torch.equal(steps[-1].images, drawn)
    assert [step.index for step in steps] == list(range(STEPS)) and {step.num_steps for step in steps} == {STEPS}
    for before, after, copied in zip(steps, steps[1:], copies):
        assert torch.equal(before.latents, copied) and torch.equal(before.latents, after.x_t)
        assert before.sigma > after.sigma and before.timestep > after.timestep
    assert steps[0].class_labels.tolist() == [1, 3]


def test_upsampler_has_steps_too():
    pipeline, image = tiny_upsampler(), torch.rand(2, 3, SIZE // 2, SIZE // 2)
    call = {"generator": seeded(), "num_inference_steps": STEPS, "output_type": "pt"}
    *_, last = pipeline.steps(image, [1, 3], **call)
    assert torch.equal(last.images, pipeline(image, [1, 3], **{**call, "generator": seeded()}).images)


def test_each_evaluation_of_a_second_order_method_is_a_step():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(HeunDiscreteScheduler))
    steps = list(steps_of(pipeline))
    assert len(steps) == steps[0].num_steps == 2 * STEPS - 1
    assert torch.equal(steps[-1].latents, draw(pipeline))


def test_classifier_is_told_its_own_timesteps_at_the_noise_levels_of_a_run():
    classifier = tiny_classifier()
    classifier.register_to_config(num_train_timesteps=1000, beta_schedule="linear")
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    pipeline, told = tiny_pipeline(unet, HeunDiscreteScheduler(), classifier), []
    classifier.register_forward_pre_hook(lambda _, args: told.append(args[1][0].item()))
    steps = list(steps_of(pipeline))
    *_, unguided = steps_of(pipeline, guidance_scale=0.0)
    assert unguided.log_probabilities.shape == (2, 5)
    assert told == [*told[: len(steps)], told[len(steps) - 1]] and max(told) < 1000


def test_generator_of_ones_own_is_given_the_output_of_the_call():
    pipeline = tiny_pipeline()

    def drafts(**call):
        output = yield from steps_of(pipeline, output_type="pil", **call)
        yield output

    *steps, output = drafts()
    assert steps[0].x_0_images[0].size == (SIZE, SIZE)
    assert [image.tobytes() for image in output.images] == [image.tobytes() for image in steps[-1].images]
    *_, output = drafts(return_dict=False)
    assert isinstance(output, tuple)


def test_gradient_and_log_probabilities_are_those_of_the_step():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    rows, given = rows_seen(pipeline.classifier), []

    def callback(pipe, step, timestep, tensors):
        given.append(tensors["log_probabilities"])
        return {}

    watch = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["log_probabilities"]}
    steps = list(steps_of(pipeline, **watch))
    read = [step.log_probabilities for step in steps]
    assert rows == [2] * STEPS, "the gradient's own evaluation says them"
    for step, log_probabilities in zip(steps, read):
        with torch.no_grad():
            logits = pipeline.classifier(step.x_t, step.timestep.expand(2)).logits
        torch.testing.assert_close(log_probabilities, logits.log_softmax(dim=1))
        assert step.gradient.abs().amax() > 0 and not log_probabilities.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(given, read))


def test_log_probabilities_of_steps_without_a_gradient_are_computed_when_read():
    pipeline = tiny_pipeline()
    rows = rows_seen(pipeline.classifier)
    first, second, third = steps_of(pipeline, guidance_options={"step_fractions": (0.3, 0.5)})
    assert rows == [2] and first.gradient is None and second.gradient is not None
    with torch.inference_mode():
        assert first.log_probabilities is first.log_probabilities
    assert rows == [2, 2] and not first.log_probabilities.is_inference()
    with torch.no_grad():
        logits = pipeline.classifier(first.x_t, first.timestep.expand(2)).logits
    torch.testing.assert_close(first.log_probabilities, logits.log_softmax(dim=1))


def test_log_probabilities_are_of_all_images_where_some_are_guided():
    pipeline = tiny_pipeline()
    *_, last = steps_of(pipeline, guidance_scale=[0.0, 20.0])
    assert last.log_probabilities.shape == (2, 5)
    torch.testing.assert_close(last.log_probabilities.exp().sum(dim=1), torch.ones(2))


def test_log_probabilities_are_those_of_particles_that_were_drawn_anew():
    pipeline, counts = tiny_pipeline(), []
    for step in steps_of(pipeline, particles=4, num_inference_steps=6, guidance_scale=200.0):
        with torch.no_grad():
            logits = pipeline.classifier(step.x_t, step.timestep.expand(8)).logits
        torch.testing.assert_close(step.log_probabilities, logits.log_softmax(dim=1))
        counts.append(len(step.x_t.unique(dim=0)))
    assert min(counts) < 8, "no particle was drawn anew"


@pytest.mark.parametrize("case", ["without a classifier", "guidance_fn"])
def test_log_probabilities_are_those_of_the_classifier_alone(case):
    pipeline = tiny_pipeline(with_classifier=case == "guidance_fn")
    call = {"guidance_fn": lambda x_t, *_: x_t} if case == "guidance_fn" else {"guidance_scale": 0.0}
    assert [step.log_probabilities for step in steps_of(pipeline, **call)] == [None] * STEPS


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes_of_autograd_between_steps_are_those_of_the_caller(mode):
    pipeline = tiny_pipeline()
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        steps = steps_of(pipeline)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
        for step in steps:
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
            assert not step.latents.requires_grad and not step.latents.is_inference()
    assert torch.equal(step.latents, draw(pipeline))


class ReleasingPipeline(ClassifierGuidedPipeline):
    released = 0

    def maybe_free_model_hooks(self):
        self.released += 1
        super().maybe_free_model_hooks()


def fails(*_):
    raise KeyError("a callback's own error")


@pytest.mark.parametrize("end", ["close", "break", "callback", "to the end"])
def test_run_is_over_however_its_loop_is_left(end, capfd):
    parts = tiny_pipeline().components
    pipeline = ReleasingPipeline(parts["unet"], parts["scheduler"], parts["classifier"])
    pipeline.set_progress_bar_config(disable=False)
    rows = rows_seen(pipeline.unet)
    steps = steps_of(pipeline, callback_on_step_end=fails if end == "callback" else None)
    with contextlib.closing(steps), contextlib.suppress(KeyError):
        for step in steps:
            if end == "close":
                steps.close()
            if end == "break":
                break
    assert not pipeline._runs.active and pipeline.released == 1
    assert len(rows) == (STEPS if end == "to the end" else 1)
    assert capfd.readouterr().err.endswith("\n"), "the progress bar is closed"
    assert list(steps) == []


def test_arguments_are_checked_before_the_first_step():
    with pytest.raises(ValueError, match="labels"):
        steps_of(tiny_pipeline(), labels=[99])
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs`"):
        steps_of(tiny_pipeline(), callback_on_step_end_tensor_inputs=["log_probability"])


def test_runs_may_take_turns_in_one_thread():
    pipeline, seen = tiny_pipeline(), []

    def lower(called, step, timestep, tensors):
        seen.append(called.guidance_scale)
        called._guidance_scale = called.guidance_scale / 2
        return {}

    calls = [{"guidance_scale": scale, "callback_on_step_end": lower} for scale in (8.0, 80.0)]
    alone = [draw(pipeline, **call) for call in calls]
    seen.clear()
    turns = zip(*(steps_of(pipeline, **call) for call in calls))
    *_, (first, second) = turns
    assert seen == [8.0, 80.0, 4.0, 40.0, 2.0, 20.0]
    assert torch.equal(first.latents, alone[0]) and torch.equal(second.latents, alone[1])


def test_each_step_may_be_taken_in_another_thread():
    pipeline, taken = tiny_pipeline(), []
    steps = steps_of(pipeline, callback_on_step_end=lambda called, *_: taken.append(called.guidance_scale) or {})
    for _ in range(STEPS):
        thread = threading.Thread(target=lambda: taken.append(next(steps)))
        thread.start()
        thread.join()
    assert taken[::2] == [20.0] * STEPS and torch.equal(taken[-1].latents, draw(pipeline))


def test_loop_may_draw_other_images_and_stop_the_run():
    pipeline = tiny_pipeline()
    alone = draw(pipeline, guidance_scale=2.0)
    for step in steps_of(pipeline):
        assert torch.equal(draw(pipeline, guidance_scale=2.0), alone)
        assert pipeline.guidance_scale == 20.0
        pipeline._interrupt = step.index == 1
    assert step.index == 1


@pytest.mark.parametrize("pipeline_class", [ClassifierGuidedPipeline, ADMUpsamplePipeline])
def test_call_and_steps_declare_the_same_arguments(pipeline_class):
    call, steps = pipeline_class.__call__, pipeline_class.steps
    assert inspect.signature(call).parameters == inspect.signature(steps).parameters
    documented = inspect.getdoc(call).partition("Args:")[2].partition("Returns:")[0]
    assert documented and documented in inspect.getdoc(steps)
    assert all(f"{name}:" in documented for name in inspect.signature(call).parameters if name != "self")
