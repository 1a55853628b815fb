"""Sums of guidance functions, and guidance by a discriminator."""

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from guided_calls import LABELS, draw
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.guidance import ClassifierGuidance, DiscriminatorGuidance, WeightedSum, guidance_gradient


TIMESTEP = torch.tensor([300, 300])
CLASSES = torch.tensor(LABELS)


def brighter(x_t, timestep, x_0, class_labels):
    return x_0.mean(dim=(1, 2, 3))


def darker_through(x_t, timestep, x_0, class_labels):
    return -x_0.square().sum(dim=(1, 2, 3))


darker_through.through_unet = True


def pull(x_t, timestep, x_0, class_labels):
    return -x_t


def gradient_of(function) -> torch.Tensor:
    x_t = images().requires_grad_()
    through = getattr(function, "through_unet", False)
    with torch.enable_grad():
        x_0 = 3 * x_t if through else 3 * x_t.detach()
        return guidance_gradient(function, x_t if through else x_t.detach(), TIMESTEP, x_0, CLASSES)


@pytest.mark.parametrize("functions", [(brighter, pull), (brighter, darker_through), (pull, darker_through, brighter)])
def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients(functions):
    classifier = ClassifierGuidance(tiny_classifier())
    weights = [0.5, 2.0, -3.0, 1.5][: len(functions) + 1]
    total = gradient_of(WeightedSum(classifier, *functions, weights=weights))
    parts = [weight * gradient_of(function) for weight, function in zip(weights, (classifier, *functions))]
    torch.testing.assert_close(total, sum(parts))


def test_a_float16_classifier_among_them_keeps_its_small_gradients():
    classifier = ClassifierGuidance(tiny_classifier())
    single = gradient_of(WeightedSum(classifier, brighter))
    classifier.classifier.half()
    function = WeightedSum(classifier, brighter)
    assert function.dtype == torch.float16
    torch.testing.assert_close(gradient_of(function), single, rtol=0.05, atol=1e-4)


def test_a_sum_guides_a_pipeline():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    expected = draw(pipeline, guidance_scale=4.0)
    function = WeightedSum(ClassifierGuidance(pipeline.classifier), weights=[2.0])
    torch.testing.assert_close(
        draw(pipeline, guidance_scale=2.0, guidance_fn=function), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("num_class_embeds", [5, None])
def test_labels_are_drawn_from_the_classes_that_all_functions_have(num_class_embeds):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=num_class_embeds), with_classifier=False)
    guides = [ClassifierGuidance(tiny_classifier(num_classes=count)) for count in (4, 2)]
    (step,) = pipeline.steps(batch_size=30, guidance_fn=WeightedSum(*guides), guidance_scale=1.0, timesteps=[0])
    assert step.class_labels.unique().tolist() == [0, 1]


def test_a_sum_within_a_sum_is_checked_as_the_sum_is():
    inner = WeightedSum(ClassifierGuidance(tiny_classifier()))
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    pipeline = tiny_pipeline(unet, HeunDiscreteScheduler(), with_classifier=False)
    for function in (inner, WeightedSum(inner)):
        with pytest.raises(ValueError, match="requires a UNet that is given timesteps"):
            draw(pipeline, guidance_scale=2.0, guidance_fn=function)
        with pytest.raises(ValueError, match=r"`class_labels` must be in \[0, 4\], but got \[7\]"):
            draw(tiny_pipeline(tiny_unet(num_class_embeds=None)), [1, 7], guidance_scale=2.0, guidance_fn=function)
        with pytest.raises(ValueError, match="requires `class_labels`"):
            guidance_gradient(function, images(), TIMESTEP, images(), None)


def returns(value):
    return lambda x_t, timestep, x_0, class_labels: value


@pytest.mark.parametrize("value", [torch.tensor(1.0), None, 1.0, torch.ones(3)], ids=str)
def test_what_a_function_of_a_sum_returns_is_checked_as_of_the_function_alone(value):
    for function in (returns(value), WeightedSum(brighter, returns(value))):
        with pytest.raises(ValueError, match=r"must return one log-probability per image, \(2,\), or a gradient"):
            gradient_of(function)


@pytest.mark.parametrize("call", [{"particles": 2}, {"guidance_options": {"smoothing": 0.1}}], ids=str)
@pytest.mark.parametrize("function", [pull, WeightedSum(brighter, pull), WeightedSum(WeightedSum(pull))])
def test_a_gradient_is_no_log_probability_in_a_sum_either(function, call):
    pipeline = tiny_pipeline(with_classifier=False)
    with pytest.raises(ValueError, match="must return one log-probability per image with"):
        draw(pipeline, guidance_fn=function, guidance_scale=1.0, **call)


def test_a_discriminator_guides_by_the_log_ratio():
    discriminator, x_t = tiny_classifier(num_classes=2), images().requires_grad_()
    logits = discriminator(x_t, TIMESTEP).logits
    (expected,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), x_t)
    torch.testing.assert_close(gradient_of(DiscriminatorGuidance(discriminator, real_class=0)), expected)
    torch.testing.assert_close(gradient_of(DiscriminatorGuidance(discriminator)), -expected)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: WeightedSum(), "at least one guidance function"),
        (lambda: WeightedSum("classifier"), "at least one guidance function"),
        (lambda: WeightedSum(brighter, weights=[1.0, 2.0]), r"one finite number per function \(1\)"),
        (lambda: WeightedSum(brighter, weights=["1"]), "one finite number per function"),
        (lambda: WeightedSum(brighter, weights=[float("inf")]), "one finite number per function"),
        (lambda: DiscriminatorGuidance(tiny_classifier()), "must have 2 classes, real and generated, but got 5"),
        (lambda: DiscriminatorGuidance(tiny_classifier(num_classes=2), real_class=2), "`real_class` must be 0 or 1"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
