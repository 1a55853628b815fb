"""The page offers what a model can do, and draws with it."""

import pytest
from diffusers import CMStochasticIterativeScheduler, HeunDiscreteScheduler
from tiny_models import tiny_pipeline, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.page.compare import draw_side
from diffusers_adm.page.controls import class_control, scale_control, steps_control, told_control
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.page import build_page


pytestmark = pytest.mark.page


def unconditional_model() -> ClassifierGuidedPipeline:
    return tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)


def model_of_noise_levels() -> ClassifierGuidedPipeline:
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    return tiny_pipeline(unet, HeunDiscreteScheduler(), with_classifier=False)


@pytest.mark.parametrize(
    ("load", "classes", "guided", "told_or_not"),
    [
        (unconditional_model, False, False, False),
        (lambda: tiny_pipeline(tiny_unet(num_class_embeds=None)), True, True, False),
        (tiny_pipeline, True, True, False),
        (lambda: tiny_pipeline(tiny_unet(use_null_class=True)), True, True, True),
        (model_of_noise_levels, True, False, False),
    ],
)
def test_page_offers_what_the_model_can_do(load, classes, guided, told_or_not):
    model = PageModel(load())
    build_page(model)
    assert class_control(model, "Class").visible is classes
    scale, told = scale_control(model, 1.0), told_control(model)
    assert (scale.visible, scale.value) == ((True, 1.0) if guided else (False, 0))
    assert told.visible is told_or_not and told.value
    label = 2 if classes else None
    *_, (grid, images, progress) = draw_side(model, label, 2, 0, scale.value, told.value, model.schedulers[0], 2)
    assert grid.size == (16, 8) and images.shape == (2, 3, 8, 8)
    first, last = progress.removeprefix("Step ").split(" of ")
    assert first == last


def test_a_consistency_model_has_its_own_number_of_steps():
    unet = tiny_unet(out_channels=3, preconditioning="consistency", sigma_data=1.0)
    scheduler = CMStochasticIterativeScheduler(3, 0.002, 80.0)
    pipeline = tiny_pipeline(unet, scheduler, with_classifier=False, num_inference_steps=2)
    model = PageModel(pipeline)
    build_page(model)
    steps = steps_control(model, 25)
    assert (steps.value, steps.maximum) == (2, 3) and model.schedulers == ["CMStochasticIterative"]
    *_, (_, images, _) = draw_side(model, 2, 2, 0, 0, True, model.schedulers[0], steps.value)
    assert images.shape == (2, 3, 8, 8)


def test_names_that_several_classes_have_are_told_apart():
    names = {0: "crane", 1: "crane", 2: "dog, domestic dog", 3: "cat", 4: "bird"}
    assert PageModel(tiny_pipeline(id2label=names)).classes == ["crane (0)", "crane (1)", "dog", "cat", "bird"]


def test_a_run_changes_no_other_one():
    model = PageModel(tiny_pipeline(id2label=dict(enumerate("abcde"))))
    one, other = model.pipeline("DDIM"), model.pipeline("DDPM")
    assert one.unet is other.unet and one.classifier is other.classifier
    assert type(one.scheduler).__name__ == "DDIMScheduler" and type(other.scheduler).__name__ == "DDPMScheduler"
    assert one.class_ids("c") == [2]
