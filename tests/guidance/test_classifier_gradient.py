"""The gradient of log p(y | x_t) of a noisy classifier."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from model_calls import (
    CPU,
    LABELS,
    OFFLOADS,
    TIMESTEPS,
    block_calls,
    every_pool,
    float8_rounded,
    predict,
    relative_error,
)
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier

from diffusers_adm.guidance import classifier_gradient
from diffusers_adm.models.noisy_classifier import NoisyClassifierOutput


def gradient_of(classifier: torch.nn.Module, sample: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    sample = images() if sample is None else sample
    arguments = {"timestep": TIMESTEPS, "class_labels": LABELS, **kwargs}
    return classifier_gradient(classifier, sample, **arguments)


class LinearClassifier(torch.nn.Module):
    """Classifier whose gradient of log p(y | x) is known: W_y - sum_k p_k W_k."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(NUM_CLASSES, 3 * SIZE * SIZE, generator=generator, dtype=torch.float64) / 10
        self.weight = torch.nn.Parameter(weight)

    def forward(self, sample, timestep):
        return NoisyClassifierOutput(logits=sample.flatten(1) @ self.weight.T)


def test_gradient_equals_its_closed_form():
    classifier, sample = LinearClassifier(), images().double()
    with torch.no_grad():
        probability = classifier(sample, TIMESTEPS).logits.softmax(dim=-1)
        expected = (classifier.weight[LABELS] - probability @ classifier.weight).reshape(sample.shape)
    gradient = gradient_of(classifier, sample)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@every_pool
def test_gradient_points_where_the_label_grows_likelier(pool):
    classifier, sample = tiny_classifier(pool), images()

    def log_probability(sample):
        return predict(classifier, sample).double().log_softmax(dim=-1)[torch.arange(2), LABELS]

    gradient = gradient_of(classifier)
    step = 3e-3 * torch.randn(sample.shape, generator=torch.Generator().manual_seed(4))
    change = log_probability(sample + step) - log_probability(sample - step)
    torch.testing.assert_close(change, 2 * (gradient * step).sum(dim=(1, 2, 3)).double(), rtol=2e-2, atol=2e-6)


@every_pool
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_under_no_grad_and_inference_mode(pool, mode):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    assert expected.shape == images().shape and expected.abs().max() > 0
    with mode():
        # All made within, as a pipeline that is called under inference mode makes them.
        gradient = gradient_of(classifier, images(), timestep=TIMESTEPS.clone(), class_labels=LABELS.clone())
    assert torch.equal(gradient, expected)
    assert not gradient.requires_grad


@every_pool
def test_gradient_leaves_weights_as_they_are(pool):
    classifier = tiny_classifier(pool)
    frozen = classifier.encoder.conv_in.weight.requires_grad_(False)
    other = classifier.encoder.conv_in.bias
    other.grad = torch.full_like(other, 2.0)
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    gradients = [parameter.grad for parameter in classifier.parameters()]
    sample = images()
    gradient_of(classifier, sample)
    assert not frozen.requires_grad
    assert flags == [parameter.requires_grad for parameter in classifier.parameters()]
    assert all(before is parameter.grad for before, parameter in zip(gradients, classifier.parameters(), strict=True))
    assert torch.equal(other.grad, torch.full_like(other, 2.0))
    assert not sample.requires_grad and sample.grad is None


@every_pool
def test_gradient_is_the_same_alone_and_in_a_batch(pool):
    classifier, sample = tiny_classifier(pool), images(4)
    timestep, labels = torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 4])
    together = gradient_of(classifier, sample, timestep=timestep, class_labels=labels)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = gradient_of(classifier, sample[rows], timestep=timestep[rows], class_labels=labels[rows])
        assert relative_error(alone, together[rows]) < 1e-4


@every_pool
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("offload", ["block", "leaf"])
def test_gradient_is_the_same_under_group_offloading(pool, offload, to_disk, checkpointing, tmp_path):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    path = str(tmp_path) if to_disk else None
    classifier.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **OFFLOADS[offload]
    )
    if checkpointing:
        classifier.enable_gradient_checkpointing()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(gradient_of(classifier), expected)


@every_pool
def test_gradient_under_layerwise_casting_is_that_of_the_rounded_weights(pool):
    classifier = tiny_classifier(pool)
    expected = gradient_of(float8_rounded(classifier))
    assert relative_error(gradient_of(classifier), expected) > 1e-3
    classifier.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(gradient_of(classifier), expected)


@every_pool
def test_gradient_recomputes_nothing_unless_checkpointing_is_on(pool):
    classifier = tiny_classifier(pool)
    calls = block_calls(classifier)
    expected = gradient_of(classifier)
    assert len(calls) == 5 and set(calls.values()) == {1}

    classifier.enable_gradient_checkpointing()
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(gradient_of(classifier), expected)
    assert len(calls) == 5 and set(calls.values()) == {2}


@every_pool
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_gradient_in_half_precision_is_near_full(pool, dtype, tolerance):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    gradient = gradient_of(classifier.to(dtype))
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, expected) < tolerance


def test_float16_gradient_survives_underflow():
    # A classifier that is this sure has gradients below float16's smallest number.
    classifier = LinearClassifier().half()
    classifier.dtype = torch.float16
    sample = images() * 1e-3
    with torch.no_grad():
        classifier.weight.mul_(1e-5)
        weight = classifier.weight.float()
        probability = (sample.half().float().flatten(1) @ weight.T).softmax(dim=-1)
        expected = (weight[LABELS] - probability @ weight).reshape(sample.shape)
    assert expected.abs().median() < 2e-6
    assert relative_error(gradient_of(classifier, sample), expected) < 5e-3


@every_pool
def test_classifier_is_differentiable_under_an_outer_no_grad(pool):
    classifier, sample = tiny_classifier(pool), images().requires_grad_()
    with torch.no_grad():
        with torch.enable_grad():
            total = classifier(sample, TIMESTEPS).logits.sum()
        (gradient,) = torch.autograd.grad(total, sample)
    assert gradient.abs().max() > 0


def test_gradient_takes_any_classifier_with_logits():
    def classifier(sample, timestep):
        return SimpleNamespace(logits=sample.mean(dim=(2, 3)))

    sample = images()
    gradient = classifier_gradient(classifier, sample, TIMESTEPS, torch.tensor([0, 2]))
    expected = (F.one_hot(torch.tensor([0, 2]), 3) - sample.mean(dim=(2, 3)).softmax(dim=-1)) / SIZE**2
    torch.testing.assert_close(gradient, expected[:, :, None, None].expand_as(sample))
