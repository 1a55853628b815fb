"""Guidance beyond the paper's: without a classifier, by any function, and options of when and how strongly it acts."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline
from diffusers_adm.diffusion import NoiseSchedule, posterior_mean, x_0_from_epsilon
from diffusers_adm.guidance import (
    ClassifierGuidance,
    GuidanceOptions,
    classifier_gradient,
    guidance_gradient,
    normalized,
    shortened,
)


LABELS = [1, 3]
NULL = NUM_CLASSES


def draw(pipeline, class_labels=LABELS, **call) -> torch.Tensor:
    arguments = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent", **call}
    return pipeline(class_labels, generator=torch.Generator().manual_seed(0), **arguments).images


def pipeline_of(scheduler_class: type = DDPMScheduler, **changes):
    """Of a UNet with a null class."""
    unet = tiny_unet(use_null_class=True)
    return tiny_pipeline(unet, tiny_scheduler(scheduler_class, **changes))


def calls_of(module: torch.nn.Module) -> list[int]:
    """A list that collects the batch size of every call of a model."""
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def one_step_x_0(pipeline, x_t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """What DDIM makes of x_t in a single step from timestep 0."""
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, [0])
    return x_0_from_epsilon(schedule, x_t, 0, epsilon)


def epsilon_of(unet, x_t: torch.Tensor, labels: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return unet(x_t, torch.zeros(len(x_t), dtype=torch.long), torch.tensor(labels)).sample[:, :3]


@pytest.mark.parametrize("weights", [1.5, [0.5, 3.0], -1.0])
def test_classifier_free_guidance_moves_epsilon_away_from_that_of_no_class(weights):
    pipeline, x_t = pipeline_of(DDIMScheduler, clip_sample=False), images()
    rows = calls_of(pipeline.unet)
    found = draw(pipeline, cfg_weight=weights, num_inference_steps=1, latents=x_t)
    assert rows == [4]  # both in one evaluation
    w = torch.as_tensor(weights).expand(2)[:, None, None, None]
    epsilon = (1 + w) * epsilon_of(pipeline.unet, x_t, LABELS) - w * epsilon_of(pipeline.unet, x_t, [NULL, NULL])
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)


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
    with pytest.raises(ValueError, match="let guidance act at none"):
        draw(pipeline, cfg_weight=2.0, guidance_options={"interval": (1e6, 1e7)})


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
    found = draw(pipeline, cfg_weight=2.0, guiding_unet=weaker, num_inference_steps=1, latents=x_t)
    epsilon = 3 * epsilon_of(pipeline.unet, x_t, LABELS) - 2 * epsilon_of(weaker, x_t, LABELS)
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)
    weaker = torch.compile(weaker, backend="eager")
    again = draw(pipeline, cfg_weight=2.0, guiding_unet=weaker, num_inference_steps=1, latents=x_t)
    torch.testing.assert_close(again, found)
    itself = draw(pipeline, cfg_weight=2.0, guiding_unet=pipeline.unet)
    torch.testing.assert_close(itself, draw(pipeline), rtol=1e-3, atol=1e-3)
    unlabelled = tiny_unet(num_class_embeds=None)
    assert draw(pipeline, cfg_weight=1.0, guiding_unet=unlabelled).isfinite().all()


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
    with pytest.raises(ValueError, match="told the class"):
        enlarged(cfg_weight=1.0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"cfg_weight": 1.0, "condition_unet": False}, "null class"),
        ({"cfg_weight": [1.0]}, "1 numbers were given as cfg_weight for 2 images"),
        ({"cfg_weight": math.nan}, "cfg_weight=nan is not finite"),
        ({"cfg_weight": "strong"}, "cfg_weight='strong' is neither"),
        ({"cfg_weight": 1.0, "guiding_unet": tiny_unet(sample_size=16, attention_resolutions=(8,))}, "sample_size"),
        ({"guidance_options": {"intervals": (0, 1)}}, "['intervals'] are not among"),
        ({"guidance_options": "interval"}, "guidance_options must be"),
        ({"guidance_options": {"interval": (2.0, 1.0)}}, "interval=(2.0, 1.0)"),
        ({"guidance_options": {"interval": 5}}, "interval=5"),
        ({"guidance_options": {"interval": ("a", "b")}}, "interval=('a', 'b')"),
        ({"guidance_options": {"step_fractions": None}}, "step_fractions=None"),
        ({"guidance_options": {"step_fractions": (0.5, 2)}}, "in [0, 1]"),
        ({"guidance_options": {"max_size": "a"}}, "max_size='a'"),
        ({"guidance_options": {"schedule": "steep"}}, "schedule='steep'"),
        ({"guidance_options": {"schedule": ["linear"]}}, "schedule=['linear']"),
        (
            {"cfg_weight": 1.0, "guiding_unet": tiny_unet(seed=7), "condition_unet": False},
            "guiding_unet has no null class",
        ),
        ({"guidance_options": {"every": 0}}, "every=0"),
        ({"guidance_options": {"skipped": "forget"}}, "skipped='forget'"),
        ({"guidance_options": {"gradient_at": "x_0"}}, "gradient_at='x_0'"),
        ({"guidance_options": {"max_entropy_scale": 0}}, "max_entropy_scale=0"),
        ({"guidance_options": {"entropy_scaling": True}, "guidance_fn": lambda *_: None}, "entropy_scaling"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(call, said):
    pipeline = pipeline_of()
    rows = calls_of(pipeline.unet)
    with pytest.raises(ValueError) as error:
        draw(pipeline, **call)
    assert said in str(error.value) and rows == []


def test_no_null_class_no_classifier_free_guidance():
    with pytest.raises(ValueError, match="use_null_class"):
        draw(tiny_pipeline(), cfg_weight=1.0)

    def through(x_t, timestep, x_0, class_labels):
        return x_0.sum(dim=(1, 2, 3))

    through.through_unet = True
    with pytest.raises(ValueError, match="through the UNet"):
        draw(pipeline_of(), guidance_fn=through, guidance_options={"gradient_at": "mean"})
    with pytest.raises(ValueError, match="gradient_at='mean' is of DDPMScheduler"):
        draw(pipeline_of(DDIMScheduler), guidance_options={"gradient_at": "mean"})


def test_guidance_acts_within_its_interval_and_costs_nothing_outside():
    pipeline = pipeline_of(DDIMScheduler)
    sigmas = NoiseSchedule.from_config(pipeline.scheduler.config, "ddim10").x_0_from_epsilon.flip(0).tolist()
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
    with pytest.raises(ValueError, match="at none of the 10 steps"):
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


def test_a_classifier_as_a_function_guides_as_the_pipelines_own():
    pipeline = pipeline_of()
    classifier = pipeline.classifier

    def by_hand(x_t, timestep, x_0, class_labels):
        return classifier(x_t, timestep).logits.log_softmax(dim=1)[range(len(x_t)), class_labels]

    expected = draw(pipeline, guidance_scale=[20.0, 5.0])
    without = tiny_pipeline(pipeline.unet, with_classifier=False)
    torch.testing.assert_close(draw(without, guidance_scale=[20.0, 5.0], guidance_fn=by_hand), expected)

    def gradient(x_t, timestep, x_0, class_labels):
        return classifier_gradient(classifier, x_t, timestep, class_labels)

    torch.testing.assert_close(draw(without, guidance_scale=[20.0, 5.0], guidance_fn=gradient), expected)
    with torch.inference_mode():
        torch.testing.assert_close(draw(without, guidance_scale=[20.0, 5.0], guidance_fn=by_hand), expected)


@pytest.mark.parametrize("through_unet", [False, True])
def test_a_function_of_x_0_guides_by_its_gradient_there_or_through_the_unet(through_unet):
    pipeline, x_t, target = pipeline_of(DDIMScheduler, clip_sample=False), images(), images(seed=5)

    def near(x_t, timestep, x_0, class_labels):
        return -(x_0 - target).square().sum(dim=(1, 2, 3))

    near.through_unet = through_unet
    rows = calls_of(pipeline.unet)
    found = draw(pipeline, guidance_fn=near, guidance_scale=0.3, num_inference_steps=1, latents=x_t)
    assert rows == [2]  # one evaluation serves the gradient and the step

    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, [0])
    leaf = x_t.clone().requires_grad_()
    epsilon = pipeline.unet(leaf, torch.zeros(2, dtype=torch.long), torch.tensor(LABELS)).sample[:, :3]
    x_0 = x_0_from_epsilon(schedule, leaf, 0, epsilon)
    (gradient,) = torch.autograd.grad(near(None, None, x_0, None).sum(), leaf if through_unet else x_0)
    shifted = epsilon - schedule.noise_scale[0].float() * 0.3 * gradient
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, shifted.detach()), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = draw(pipeline, guidance_fn=near, guidance_scale=0.3, num_inference_steps=1, latents=x_t)
    assert torch.equal(again, found)
    if through_unet:
        with pytest.raises(ValueError, match="x_0_fn returned what does not depend on x_0"):
            draw(pipeline, guidance_fn=near, guidance_scale=0.3, x_0_fn=lambda x_0, timestep: x_0.detach())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipeline.unet.parameters())


def test_a_function_may_know_classes_that_no_network_knows():
    seen = []

    def near(x_t, timestep, x_0, class_labels):
        seen.append(class_labels.tolist())
        return -x_0.square().sum(dim=(1, 2, 3))

    unconditional = tiny_unet(num_class_embeds=None)
    for with_classifier in (False, True):
        pipeline = tiny_pipeline(unconditional, with_classifier=with_classifier)
        draw(pipeline, [1, NUM_CLASSES + 1], guidance_fn=near, guidance_scale=1.0)
    assert seen == [[1, NUM_CLASSES + 1]] * 8
    with pytest.raises(ValueError, match=f"{NUM_CLASSES + 1}"):
        draw(tiny_pipeline(), [1, NUM_CLASSES + 1], guidance_fn=near, guidance_scale=1.0)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_gradients_through_a_unet_in_half_precision_neither_vanish_nor_overflow(size):
    target = images(seed=5)

    def near(x_t, timestep, x_0, class_labels):
        return -size * (x_0 - target.to(x_0)).square().sum(dim=(1, 2, 3))

    near.through_unet = True
    found = {}
    for dtype in (torch.float32, torch.float16):
        pipeline = pipeline_of(DDIMScheduler).to(dtype)

        def keep(_, step, timestep, tensors, dtype=dtype):
            return found.setdefault(dtype, tensors) and {}

        call = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["gradient"]}
        draw(pipeline, guidance_fn=near, guidance_scale=1.0, num_inference_steps=1, latents=images(), **call)
    exact, half = (found[dtype]["gradient"] for dtype in found)
    assert (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradient_has_the_dtype_of_x_t(dtype):
    classifier, x_t = tiny_classifier().to(dtype), images().to(dtype)
    timestep, labels = torch.tensor([5, 200]), torch.tensor(LABELS)
    gradient = classifier_gradient(classifier, x_t, timestep, labels)
    assert gradient.dtype == dtype and gradient.any()
    given = guidance_gradient(lambda x_t, *_: torch.ones(x_t.shape).half(), x_t, timestep, x_t, labels)
    assert given.dtype == dtype and given.all()


def test_a_function_may_guide_images_without_labels():
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    bright = draw(
        pipeline, None, batch_size=2, guidance_fn=lambda x_t, t, x_0, y: x_0.sum(dim=(1, 2, 3)), guidance_scale=5.0
    )
    assert bright.mean() > draw(pipeline, None, batch_size=2).mean() + 0.05


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x_t, *_: x_t.sum(), "returned ()"),
        (lambda x_t, *_: None, "returned NoneType"),
        (lambda x_t, *_: torch.zeros(2), "does not depend on x_t or x_0"),
        (lambda x_t, *_: torch.zeros(2, requires_grad=True) + 1, "does not depend on x_t or x_0"),
    ],
)
def test_a_function_that_returns_something_else_is_told(returned, said):
    with pytest.raises(ValueError) as error:
        draw(pipeline_of(), guidance_fn=returned, guidance_scale=1.0)
    assert said in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_told_with_its_step_and_image(value):
    def breaks(x_t, timestep, x_0, class_labels):
        gradient = torch.ones_like(x_t)
        gradient[1, 0, 0, 0] = value if timestep[1] <= 666 else 1.0
        return gradient

    with pytest.raises(ValueError, match="guides image 1 is not finite at step 1 of 4, timestep 666"):
        draw(pipeline_of(), guidance_fn=breaks, guidance_scale=1.0, guidance_options={"normalize": True})


@pytest.mark.parametrize("call", [{"guidance_scale": 1e10}, {"guidance_scale": 1.0, "guidance_options": {"every": 2}}])
def test_a_gradient_that_its_scale_makes_no_number_is_told(call):
    size = 1e30 if call["guidance_scale"] > 1 else 3e38

    def steep(x_t, timestep, x_0, class_labels):
        return torch.full_like(x_t, size)

    options = {"schedule": lambda fraction: 1.0 if fraction == 0 else 2.0, **call.get("guidance_options", {})}
    step = 0 if call["guidance_scale"] > 1 else 1
    with pytest.raises(ValueError, match=f"guides image 0 is not finite at step {step} of 4"):
        draw(pipeline_of(), guidance_fn=steep, **{**call, "guidance_options": options})


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e20])
def test_gradients_of_any_size_are_normalised_and_shortened(size):
    gradient = images() * size
    unit = images() / images().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(normalized(gradient), unit)
    torch.testing.assert_close(shortened(gradient, 0.2), 0.2 * unit if size > 0.5 else gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf, "a", None])
def test_schedules_that_give_no_numbers_are_refused(value):
    options = {"schedule": lambda fraction: 1.0 if fraction < 0.7 else value}
    with pytest.raises(ValueError, match="schedule gave .* at 0.75"):
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


def test_gradient_at_the_mean_is_that_of_the_next_timestep():
    pipeline, seen = pipeline_of(), []

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
        torch.testing.assert_close(where, posterior_mean(schedule, states[step - 1], 3 - step, x_0))
    found, published = (
        draw(pipeline, guidance_scale=20.0, guidance_options={"gradient_at": at}) for at in ("mean", "x_t")
    )
    assert (found - published).abs().max() > 1e-4
