"""Options of guidance: the steps in which it acts, its strength, and its gradients."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from guided_calls import LABELS, calls_of, draw, pipeline_of
from tiny_models import NUM_CLASSES, images, tiny_classifier, tiny_unet

from diffusers_adm.diffusion import NoiseSchedule, posterior_mean
from diffusers_adm.guidance import (
    ClassifierGuidance,
    GuidanceOptions,
    classifier_gradient,
    guidance_gradient,
    normalized,
    shortened,
)


def test_options_say_when_classifier_free_guidance_acts_too():
    pipeline = pipeline_of(DDIMScheduler)
    rows, states = calls_of(pipeline.unet), []

    def remember(_, step, timestep, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    always = draw(pipeline, cfg_weight=2.0, callback_on_step_end=remember)
    halfway = states[1]
    found = draw(pipeline, cfg_weight=2.0, guidance_options={"step_fractions": (0.0, 0.5)})
    assert rows == [4] * 4 + [4, 4, 2, 2]
    rest = draw(pipeline, num_inference_steps=None, timesteps=[250, 0], latents=halfway)
    torch.testing.assert_close(found, rest, rtol=1e-4, atol=1e-4)
    assert (found - always).abs().max() > 1e-2
    with pytest.raises(ValueError, match="must let guidance act at one of"):
        draw(pipeline, cfg_weight=2.0, guidance_options={"interval": (1e6, 1e7)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"cfg_weight": 1.0, "condition_unet": False}, "class"),
        ({"cfg_weight": [1.0]}, "`cfg_weight` must have one number per image, 2, but got 1"),
        (
            {"cfg_weight": math.nan},
            "`cfg_weight` must be finite, with an absolute value of at most 1.8e+19, but got nan",
        ),
        ({"cfg_weight": "strong"}, "`cfg_weight` must be one number, or one number per image, but got 'strong'"),
        ({"cfg_weight": 1.0, "weaker": tiny_unet(sample_size=16, attention_resolutions=(8,))}, "sample_size"),
        ({"guidance_options": {"intervals": (0, 1)}}, "but got ['intervals']"),
        ({"guidance_options": "interval"}, "`guidance_options` must be"),
        (
            {"guidance_options": {"interval": (2.0, 1.0)}},
            "`interval` must be two numbers in [0, inf], the smaller first, but got (2.0, 1.0)",
        ),
        ({"guidance_options": {"interval": 5}}, "but got 5"),
        ({"guidance_options": {"interval": ("a", "b")}}, "but got ('a', 'b')"),
        ({"guidance_options": {"step_fractions": None}}, "`step_fractions` must be two numbers in [0, 1]"),
        ({"guidance_options": {"step_fractions": (0.5, 2)}}, "in [0, 1]"),
        ({"guidance_options": {"max_size": "a"}}, "`max_size` must be a number above 0, or None, but got 'a'"),
        ({"guidance_options": {"schedule": "steep"}}, "a function, but got 'steep'"),
        ({"guidance_options": {"schedule": ["linear"]}}, "a function, but got ['linear']"),
        (
            {"cfg_weight": 1.0, "weaker": tiny_unet(seed=7), "condition_unet": False},
            "`weaker` must have a null class",
        ),
        ({"guidance_options": {"every": 0}}, "`every` must be an integer of at least 1, but got 0"),
        ({"guidance_options": {"skipped": "forget"}}, "`skipped` must be one of ('reuse', 'sum'), but got 'forget'"),
        ({"guidance_options": {"gradient_at": "x_0"}}, "`gradient_at` must be one of ('x_t', 'mean'), but got 'x_0'"),
        ({"guidance_options": {"max_entropy_scale": 0}}, "`max_entropy_scale` must be a number above 0, but got 0"),
        ({"guidance_options": {"entropy_scaling": True}, "guidance_fn": lambda *_: None}, "entropy_scaling"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(call, said):
    pipeline = pipeline_of()
    rows = calls_of(pipeline.unet)
    with pytest.raises(ValueError) as error:
        draw(pipeline, **call)
    assert said in str(error.value) and rows == []


def test_guidance_acts_within_its_interval_and_costs_nothing_outside():
    pipeline = pipeline_of(DDIMScheduler)
    sigmas = NoiseSchedule.from_config(pipeline.scheduler.config, "ddim10").sigma.flip(0).tolist()
    low, high = sigmas[6], sigmas[2]  # from above the first up to the second: steps 2 to 5
    rows, seen = calls_of(pipeline.classifier), []
    pipeline.classifier.register_forward_pre_hook(lambda _, args: seen.append(int(args[1][0])))
    options = GuidanceOptions(interval=(low, high))
    found = draw(pipeline, num_inference_steps=10, guidance_scale=20.0, guidance_options=options)
    assert rows == [2] * 4 and seen == [700, 600, 500, 400]
    by_fractions = {"step_fractions": (0.2, 0.6)}
    assert torch.equal(
        draw(pipeline, num_inference_steps=10, guidance_scale=20.0, guidance_options=by_fractions), found
    )
    assert (draw(pipeline, num_inference_steps=10, guidance_scale=20.0) - found).abs().max() > 1e-3
    with pytest.raises(ValueError, match="at one of the 10 steps or more"):
        draw(pipeline, num_inference_steps=10, guidance_scale=20.0, guidance_options={"interval": (1e3, 1e4)})


def test_scale_follows_its_schedule():
    sigmas = [4.0, 3.0, 2.0, 1.0]
    assert GuidanceOptions().factors(sigmas) == [1, 1, 1, 1]
    assert GuidanceOptions(schedule="linear").factors(sigmas) == [1, 0.75, 0.5, 0.25]
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    assert GuidanceOptions(schedule="cosine").factors(sigmas) == pytest.approx(cosine)
    rising = GuidanceOptions(schedule=lambda fraction: 2 * fraction, interval=(1.0, 3.0))
    assert rising.factors(sigmas) == [0, 0.5, 1.0, 0]


def test_entropy_scaling_divides_by_the_share_of_the_entropy():
    classifier, timestep, labels = tiny_classifier(), torch.tensor([10, 800]), torch.tensor(LABELS)
    x_t = images()
    with torch.no_grad():
        probabilities = classifier(x_t, timestep).logits.softmax(dim=1)
    entropy = -(probabilities * probabilities.log()).sum(dim=1)
    plain = classifier_gradient(classifier, x_t, timestep, labels)
    scaled = guidance_gradient(ClassifierGuidance(classifier, 1000.0), x_t, timestep, x_t, labels)
    expected = (math.log(NUM_CLASSES) / entropy)[:, None, None, None] * plain
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-8)
    clamped = guidance_gradient(ClassifierGuidance(classifier, 1.001), x_t, timestep, x_t, labels)
    torch.testing.assert_close(
        clamped, (math.log(NUM_CLASSES) / entropy).clamp(max=1.001)[:, None, None, None] * plain
    )

    class Certain(torch.nn.Module):
        def forward(self, x_t, timestep):
            return type("Output", (), {"logits": 1e6 * classifier(x_t, timestep).logits})

    certain = guidance_gradient(ClassifierGuidance(Certain(), 1000.0), x_t, timestep, x_t, labels)
    assert certain.isfinite().all()  # of no entropy, and no gradient


def test_entropy_scaling_of_a_classifier_in_half_precision_that_is_sure_of_another_class():
    classifier, timestep = tiny_classifier(), torch.tensor([10, 800])
    final = [layer for layer in classifier.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        for parameter in final.parameters():
            parameter *= 40
    least = classifier(images(), timestep).logits.argmin(dim=1)
    found = []
    for dtype in (torch.float32, torch.float16):
        guide = ClassifierGuidance(classifier.to(dtype), 1000.0)
        found.append(guidance_gradient(guide, images(), timestep, images(), least))
    exact, half = found
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_normalized_gradients_have_one_size():
    gradient = images() * torch.tensor([1e-6, 50.0])[:, None, None, None]
    found = normalized(gradient)
    torch.testing.assert_close(found.square().mean(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(found[1], gradient[1] / gradient[1].square().mean().sqrt())
    assert torch.equal(normalized(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))
    pipeline = pipeline_of(DDIMScheduler)
    small, large = (
        draw(pipeline, guidance_fn=lambda x_t, *_, size=size: size * x_t.tanh(), guidance_scale=0.1,
             guidance_options={"normalize": True})
        for size in (1e-3, 1e3)
    )  # fmt: skip
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_gradients_that_are_not_asked_for_are_reused_or_summed(scheduler_class):
    pipeline, direction = pipeline_of(scheduler_class), images(seed=9)
    asked = []

    def constant(x_t, timestep, x_0, class_labels):
        asked.append(int(timestep[0]))
        return direction

    def run(fn=constant, **options):
        asked.clear()
        return draw(pipeline, guidance_fn=fn, guidance_scale=0.5, num_inference_steps=7, guidance_options=options)

    always = run()
    assert len(asked) == 7
    visited = list(asked)
    assert torch.equal(run(every=3), always) and asked == visited[::3]
    summed = run(every=3, skipped="sum")
    assert asked == visited[::3]
    counts = dict(zip(visited[::3], (3, 3, 1)))
    by_hand = run(lambda x_t, timestep, *_: direction * counts.get(int(timestep[0]), 0))
    torch.testing.assert_close(summed, by_hand)
    assert (summed - always).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e20])
def test_gradients_of_any_size_are_normalised_and_shortened(size):
    gradient = images() * size
    unit = images() / images().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(normalized(gradient), unit)
    torch.testing.assert_close(shortened(gradient, 0.2), 0.2 * unit if size > 0.5 else gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf, "a", None])
def test_schedules_that_give_no_numbers_are_refused(value):
    options = {"schedule": lambda fraction: 1.0 if fraction < 0.7 else value}
    with pytest.raises(ValueError, match="`schedule` must return a finite number, but at fraction 0.75"):
        draw(pipeline_of(), guidance_scale=1.0, guidance_options=options)


def test_an_image_that_is_guided_from_now_on_does_not_wait_for_the_next_gradient():
    pipeline, gradients = pipeline_of(), []

    def turn_on(called, step, timestep, tensors):
        gradients.append(tensors["gradient"])
        called._guidance_scale = [20.0, 20.0]
        return {}

    draw(
        pipeline, guidance_scale=[0.0, 20.0], guidance_options={"every": 4}, callback_on_step_end=turn_on,
        callback_on_step_end_tensor_inputs=["gradient"],
    )  # fmt: skip
    assert not gradients[0][0].any() and all(gradient.flatten(1).any(dim=1).all() for gradient in gradients[1:])


@pytest.mark.parametrize("thresholding", [False, True])
def test_gradient_at_the_mean_is_that_of_the_next_timestep(thresholding):
    pipeline, seen = pipeline_of(clip_sample=not thresholding, thresholding=thresholding), []

    def watch(x_t, timestep, x_0, class_labels):
        seen.append((x_t.detach().clone(), timestep.tolist(), x_0.detach().clone()))
        return torch.zeros_like(x_t)

    states = []
    draw(
        pipeline, guidance_fn=watch, guidance_scale=1.0, guidance_options={"gradient_at": "mean"},
        callback_on_step_end=lambda _, step, t, tensors: states.append(tensors["latents"].clone()) or tensors,
    )  # fmt: skip
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, "4")
    assert [timestep for _, timestep, _ in seen] == [[666] * 2, [333] * 2, [0] * 2, [0] * 2]
    for step in (1, 2, 3):
        where, _, x_0 = seen[step]
        x_0 = pipeline.scheduler._threshold_sample(x_0) if thresholding else x_0
        torch.testing.assert_close(where, posterior_mean(schedule, states[step - 1], 3 - step, x_0))
    found, published = (
        draw(pipeline, guidance_scale=20.0, guidance_options={"gradient_at": at}) for at in ("mean", "x_t")
    )
    assert (found - published).abs().max() > 1e-4
