"""Guidance functions refuse invalid arguments, and name them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm.guidance import CleanClassifierGuidance, GuidanceOptions, classifier_gradient


ARGUMENTS = {"x_t": images(), "timestep": torch.tensor([5, 7]), "class_labels": torch.tensor([1, 2])}
BAD_ARGUMENTS = [
    ("classifier", "classifier"),
    ("classifier", None),
    ("x_t", images().numpy()),
    ("x_t", images().to(torch.complex64)),
    ("x_t", images().to_sparse()),
    ("x_t", images().long()),
    ("x_t", images()[0]),
    ("timestep", "5"),
    ("timestep", torch.tensor([5j, 7j])),
    ("timestep", [1, 2, 3]),
    ("class_labels", ["cat", "dog"]),
    ("class_labels", [0.5, 1.0]),
    ("class_labels", [1, 2, 3]),
    ("class_labels", None),
]


@pytest.mark.parametrize("name, value", BAD_ARGUMENTS)
def test_classifier_gradient_refuses_arguments_of_another_kind(name, value):
    with pytest.raises(ValueError, match=name):
        classifier_gradient(**{"classifier": tiny_classifier(), **ARGUMENTS, name: value})


def test_classifier_gradient_takes_lists_arrays_and_one_timestep():
    classifier = tiny_classifier()
    given = {**ARGUMENTS, "timestep": 5, "class_labels": np.array([1, 2])}
    expected = classifier_gradient(classifier, images(), torch.tensor([5, 5]), torch.tensor([1, 2]))
    assert torch.equal(classifier_gradient(classifier, **given), expected)


@pytest.mark.parametrize(
    "name, value",
    [
        ("classifier", "resnet"),
        ("image_processor", "processor"),
        ("through_unet", "no"),
        ("through_unet", 0),
        ("joint_temperature", "1"),
        ("joint_temperature", float("nan")),
        ("conditional_temperature", None),
    ],
)
def test_clean_classifier_guidance_refuses_arguments_of_another_kind(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        CleanClassifierGuidance(**{"classifier": torch.nn.Linear(2, 2), name: value})


def test_classes_of_a_clean_classifier_are_checked_before_it_is_called():
    class Classifier(torch.nn.Module):
        config = SimpleNamespace(num_labels=10)

        def forward(self, pixels):
            pytest.fail("the classifier was called")

    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    call = {"guidance_fn": CleanClassifierGuidance(Classifier()), "guidance_scale": 1.0, "num_inference_steps": 2}
    with pytest.raises(ValueError, match="`class_labels` must be in"):
        pipeline(class_labels=[20], **call)


def test_options_whose_names_are_no_texts_are_refused():
    with pytest.raises(ValueError, match=r"\[1, None\]"):
        GuidanceOptions.parse({1: 2, "every": 1, None: 3})
