"""Guidance by any function of x_t or x_0."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from guided_calls import LABELS, calls_of, draw, one_step_x_0, pipeline_of
from peak_memory import PeakMemory
from tiny_models import NUM_CLASSES, images, tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm.diffusion import NoiseSchedule, x_0_from_epsilon
from diffusers_adm.guidance import (
    ClassifierGuidance,
    CleanClassifierGuidance,
    WeightedSum,
    classifier_gradient,
    guidance_gradient,
)
from diffusers_adm.guidance.training_free import SmoothedGuidance


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
    found = draw(pipeline, guidance_fn=near, guidance_scale=0.3, timesteps=[0], latents=x_t)
    assert rows == [2]  # one evaluation serves the gradient and the step

    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, [0])
    leaf = x_t.clone().requires_grad_()
    epsilon = pipeline.unet(leaf, torch.zeros(2, dtype=torch.long), torch.tensor(LABELS)).sample[:, :3]
    x_0 = x_0_from_epsilon(schedule, leaf, 0, epsilon)
    (gradient,) = torch.autograd.grad(near(None, None, x_0, None).sum(), leaf if through_unet else x_0)
    shifted = epsilon - schedule.noise_scale[0].float() * 0.3 * gradient
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, shifted.detach()), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = draw(pipeline, guidance_fn=near, guidance_scale=0.3, timesteps=[0], latents=x_t)
    assert torch.equal(again, found)
    if through_unet:
        with pytest.raises(ValueError, match="`x_0_fn` must return a tensor that depends on x_0"):
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
        draw(pipeline, guidance_fn=near, guidance_scale=1.0, timesteps=[0], latents=images(), **call)
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
        (lambda x_t, *_: torch.zeros(2), "from x_t or x_0, but the returned one depends on neither"),
        (
            lambda x_t, *_: torch.zeros(2, requires_grad=True) + 1,
            "from x_t or x_0, but the returned one depends on neither",
        ),
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

    with pytest.raises(ValueError, match="guidance gradient of image 1 is not finite at step 1 of 4, timestep 666"):
        draw(pipeline_of(), guidance_fn=breaks, guidance_scale=1.0, guidance_options={"normalize": True})


@pytest.mark.parametrize("call", [{"guidance_scale": 1e10}, {"guidance_scale": 1.0, "guidance_options": {"every": 2}}])
def test_a_gradient_that_its_scale_makes_no_number_is_told(call):
    size = 1e30 if call["guidance_scale"] > 1 else 3e38

    def steep(x_t, timestep, x_0, class_labels):
        return torch.full_like(x_t, size)

    options = {"schedule": lambda fraction: 1.0 if fraction == 0 else 2.0, **call.get("guidance_options", {})}
    step = 0 if call["guidance_scale"] > 1 else 1
    with pytest.raises(ValueError, match=f"guidance gradient of image 0 is not finite at step {step} of 4"):
        draw(pipeline_of(), guidance_fn=steep, **{**call, "guidance_options": options})


def test_a_function_of_ones_own_is_asked_about_all_images():
    """Tests a subclass of the package's function that guides only some images. Its gradient may go through the UNet."""

    class OfBoth(ClassifierGuidance):
        through_unet = True

        def __call__(self, x_t, timestep, x_0, class_labels):
            assert len(x_t) == 2
            return super().__call__(x_t, timestep, x_0, class_labels) - 0.1 * x_0.square().sum(dim=(1, 2, 3))

    pipeline = pipeline_of(DDIMScheduler)
    guide = OfBoth(pipeline.classifier)
    one, both = (draw(pipeline, guidance_fn=guide, guidance_scale=[scale, 5.0]) for scale in (0.0, 5.0))
    torch.testing.assert_close(one[1], both[1], rtol=1e-4, atol=1e-5)


def test_a_classifier_may_be_cast_after_its_guidance_was_made():
    pipeline = pipeline_of(DDIMScheduler)
    guide = ClassifierGuidance(pipeline.classifier)
    pipeline.to(torch.bfloat16)
    expected = draw(pipeline, guidance_scale=2.0)
    torch.testing.assert_close(draw(pipeline, guidance_scale=2.0, guidance_fn=guide), expected)


def darkness(x_t, timestep, x_0, class_labels):
    return -x_0.square().sum(dim=(1, 2, 3))


darkness.through_unet = True


def test_a_unet_with_gradient_checkpointing_guides_alike():
    pipeline = pipeline_of(DDIMScheduler)
    call = {"guidance_fn": darkness, "guidance_scale": 0.1, "num_inference_steps": 3}
    expected = draw(pipeline, **call)
    pipeline.unet.enable_gradient_checkpointing()
    pipeline.unet.train()  # checkpointing acts only in training
    torch.testing.assert_close(draw(pipeline, **call), expected)


@pytest.mark.parametrize("guide", ["classifier", "clean classifier", "sum", "smoothed", "through the UNet"])
def test_a_gradient_keeps_nothing_for_those_of_weights(guide):
    pipeline = pipeline_of(DDIMScheduler)
    clean = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.LazyLinear(4096), torch.nn.ReLU(), torch.nn.LazyLinear(NUM_CLASSES)
    )
    clean(images())
    networks = [pipeline.unet, pipeline.classifier, clean]
    peaks = []
    for trained in (True, False):
        for network in networks:
            network.requires_grad_(trained)
        with PeakMemory() as memory:
            by_clean = CleanClassifierGuidance(clean)
            of_x_0 = {
                "clean classifier": by_clean,
                "sum": WeightedSum(by_clean),
                "smoothed": SmoothedGuidance(by_clean, 0.1, 2, torch.Generator().manual_seed(0)),
            }
            if guide in of_x_0:
                inputs = (images(), torch.tensor([5, 5]), images(), torch.tensor(LABELS))
                guidance_gradient(of_x_0[guide], *inputs)
            else:
                functions = {"classifier": None, "through the UNet": darkness}
                draw(pipeline, guidance_fn=functions[guide], guidance_scale=1.0, num_inference_steps=1)
        peaks.append(memory.peak)
        assert all(weight.requires_grad == trained for network in networks for weight in network.parameters())
    assert peaks[0] == peaks[1]


def test_x_0_fn_may_return_what_has_a_graph():
    pipeline = pipeline_of(DDIMScheduler)
    weight = torch.ones((), requires_grad=True)

    def with_graph(x_0, timestep):
        with torch.enable_grad():
            return weight * x_0

    expected = draw(pipeline, guidance_scale=2.0)
    torch.testing.assert_close(draw(pipeline, guidance_scale=2.0, x_0_fn=with_graph), expected)
