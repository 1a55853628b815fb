"""State of a run: it belongs to the run and its thread, so callbacks and threads may use one pipeline at the same time."""

import copy
import inspect
import threading
from dataclasses import fields

import pytest
import torch
from tiny_models import tiny_pipeline, tiny_unet

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.pipelines.options import SamplingOptions


def draw(pipeline, labels=(1, 3), seed=0, **call) -> torch.Tensor:
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent", **call}
    return pipeline(list(labels), generator=torch.Generator().manual_seed(seed), **arguments).images


@pytest.mark.parametrize("pipeline_class", [ClassifierGuidedPipeline, ADMUpsamplePipeline])
def test_options_of_a_run_are_arguments_of_the_call(pipeline_class):
    arguments = inspect.signature(pipeline_class.__call__).parameters
    for option in fields(SamplingOptions):
        assert arguments[option.name].default == option.default, option.name
    run = {*arguments} - {option.name for option in fields(SamplingOptions)}
    # What is given image by image, what comes back, and what watches: every other argument holds for a whole run.
    assert run <= {
        *("self", "image", "class_labels", "batch_size", "height", "width", "generator", "latents", "output_type"),
        *("return_dict", "x_0_fn", "callback_on_step_start", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "start", "strength"),
    }


def test_resolved_options_are_the_defaults_of_the_pipeline():
    pipeline = tiny_pipeline(guidance_scale=3.0, num_inference_steps=7, timestep_respacing="5")
    assert SamplingOptions().resolved(pipeline) == SamplingOptions(3.0, 7, "5")
    assert SamplingOptions(num_inference_steps=2).resolved(pipeline) == SamplingOptions(3.0, 2)
    unguided = tiny_pipeline(with_classifier=False, guidance_scale=3.0)
    assert SamplingOptions().resolved(unguided).guidance_scale == 0.0


def test_number_of_classes_is_that_of_the_networks_that_are_told_labels():
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=9, use_null_class=True))  # and a classifier of five
    assert SamplingOptions(guidance_scale=1.0).num_classes(pipeline) == 5
    assert SamplingOptions(guidance_scale=0.0).num_classes(pipeline) == 9
    assert SamplingOptions(guidance_scale=0.0, condition_unet=False).num_classes(pipeline) is None
    assert SamplingOptions(guidance_scale=[0.0, 1.0], condition_unet=False).num_classes(pipeline) == 5


def test_callback_may_call_the_pipeline():
    pipeline, seen = tiny_pipeline(), []
    alone, inner = draw(pipeline), draw(pipeline, [2], seed=7, guidance_scale=5.0, num_inference_steps=2)

    def look_inside(called, step, timestep, tensors):
        seen.append((called.guidance_scale, called.num_timesteps))
        return tensors

    def draw_another(called, step, timestep, tensors):
        nested = {"guidance_scale": 5.0, "num_inference_steps": 2, "callback_on_step_end": look_inside}
        assert torch.equal(draw(called, [2], seed=7, **nested), inner)
        assert (called.guidance_scale, called.num_timesteps, called.interrupt) == (2.0, 4, False)
        return tensors

    assert torch.equal(draw(pipeline, callback_on_step_end=draw_another), alone)
    assert seen == [(5.0, 2)] * 2 * 4
    assert (pipeline.guidance_scale, pipeline.num_timesteps) == (2.0, 4)


def test_change_in_a_run_within_a_callback_stays_in_that_run():
    pipeline = tiny_pipeline()
    alone = draw(pipeline)

    def stop(called, step, timestep, tensors):
        called._guidance_scale, called._interrupt = 0.0, True
        return tensors

    def draw_another(called, step, timestep, tensors):
        draw(called, seed=7, callback_on_step_end=stop)
        return tensors

    assert torch.equal(draw(pipeline, callback_on_step_end=draw_another), alone)
    assert pipeline.guidance_scale == 2.0 and not pipeline.interrupt


def test_run_that_fails_within_a_callback_leaves_the_run_around_it():
    pipeline = tiny_pipeline()
    alone = draw(pipeline)

    def fail(*_):
        raise KeyError("inner")

    def draw_another(called, step, timestep, tensors):
        with pytest.raises(KeyError):
            draw(called, guidance_scale=9.0, callback_on_step_end=fail)
        assert called.guidance_scale == 2.0
        return tensors

    assert torch.equal(draw(pipeline, callback_on_step_end=draw_another), alone)


def test_threads_may_share_a_pipeline():
    pipeline = tiny_pipeline()
    calls = [{"labels": [label], "seed": label, "guidance_scale": float(label)} for label in (1, 2, 3)]
    alone = [draw(pipeline, **call) for call in calls]
    together, states, start = {}, {}, threading.Barrier(len(calls))

    def run(number: int) -> None:
        def meet(called, step, timestep, tensors):
            states.setdefault(number, []).append(called.guidance_scale)
            if step == 1 and number == 2:
                called._guidance_scale = called.guidance_scale  # writes, as the others read
            start.wait(timeout=60)  # all are at the same step
            return tensors

        together[number] = draw(pipeline, **calls[number], callback_on_step_end=meet)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, call in enumerate(calls):
        assert torch.equal(together[number], alone[number])
        assert states[number] == [call["guidance_scale"]] * 4


def test_copied_pipeline_has_runs_of_its_own():
    pipeline = tiny_pipeline()
    drawn = draw(pipeline)
    copied = copy.deepcopy(pipeline)
    assert copied.guidance_scale == copied.config.guidance_scale and copied.num_timesteps == 250
    assert torch.equal(draw(copied), drawn)


def test_another_thread_may_stop_a_run():
    pipeline, steps, stopped = tiny_pipeline(), [], threading.Event()

    def press_stop():
        assert pipeline.num_timesteps == 4
        pipeline._interrupt = True
        stopped.set()

    def callback(called, step, timestep, tensors):
        steps.append(step)
        if step == 1:
            threading.Thread(target=press_stop).start()
            assert stopped.wait(timeout=60)
        return tensors

    draw(pipeline, callback_on_step_end=callback)
    assert steps == [0, 1] and pipeline.interrupt


@pytest.mark.parametrize(
    "call",
    [
        {"cfg_weight": 1.0},
        {"guidance_options": {"interval": (1e6, 1e7)}},
        {"guidance_options": {"gradient_at": "median"}},
    ],
)
def test_call_that_is_refused_leaves_the_generator_as_it_was(call):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(ValueError):
        tiny_pipeline()(batch_size=2, num_inference_steps=4, guidance_scale=2.0, generator=generator, **call)
    assert torch.equal(generator.get_state(), state)


def test_latents_that_callbacks_change_in_place_are_copies():
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = latents.clone()
    with torch.inference_mode():
        made_there = latents.clone()

    def change(called, step, timestep, tensors):
        tensors["latents"].mul_(0.5)
        return tensors

    for x_t in (latents, made_there):
        draw(tiny_pipeline(), latents=x_t, callback_on_step_start=change)
        assert torch.equal(x_t, given)
