"""Calls and components that `ClassifierGuidedPipeline` refuses."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from pipeline_calls import NAMES, draw, refused, seeded
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.guidance import CleanClassifierGuidance, WeightedSum
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


BAD_CALLS = {
    "label above the range": ({"class_labels": [1, 5]}, ["5", "[0, 4]"]),
    "label below the range": ({"class_labels": [-1, 0]}, ["-1", "[0, 4]"]),
    "null class is no label": ({"class_labels": NUM_CLASSES}, ["5", "[0, 4]"]),
    "label that is no number": ({"class_labels": [1.5, 2]}, ["1.5"]),
    "label that is a truth value": ({"class_labels": True}, ["True"]),
    "tensor of floats": ({"class_labels": torch.tensor([0.5, 1.0])}, ["0.5"]),
    "unknown name": ({"class_labels": ["goldfsh", "ray"]}, ["goldfsh", "goldfish"]),
    "name in other letters": ({"class_labels": "GOLDFISH"}, ["GOLDFISH"]),
    "no labels": ({"class_labels": []}, ["0", "at least 1"]),
    "labels and batch size": ({"class_labels": [1, 2], "batch_size": 3}, ["2", "3"]),
    "labels and latents": ({"class_labels": [1, 2], "latents": images(3)}, ["2", "3"]),
    "batch of none": ({"class_labels": None, "batch_size": 0}, ["0", "at least 1"]),
    "number of scales": ({"guidance_scale": [1.0, 2.0, 3.0]}, ["3", "2"]),
    "no scales": ({"guidance_scale": []}, ["0", "2"]),
    "infinite scale": ({"guidance_scale": float("inf")}, ["inf", "finite"]),
    "scale that is not a number": ({"guidance_scale": [1.0, float("nan")]}, ["nan", "finite"]),
    "number of generators": ({"generator": [seeded()] * 3}, ["3", "2"]),
    "a generator missing": ({"generator": [None, seeded()]}, ["torch.Generator", "None"]),
    "no steps": ({"num_inference_steps": 0}, ["0", "[1, 1000]"]),
    "negative steps": ({"num_inference_steps": -5}, ["-5", "[1, 1000]"]),
    "too many steps": ({"num_inference_steps": 1001}, ["1001", "[1, 1000]"]),
    "respacing that is no number": ({"timestep_respacing": "fast"}, ["fast", "ddim25"]),
    "respacing of more than there are": ({"timestep_respacing": "600,600"}, ["600,600", "500"]),
    "respacing without a stride": ({"timestep_respacing": "ddim101"}, ["ddim101", "1000"]),
    "respacing of none": ({"timestep_respacing": "0"}, ["0"]),
    "respacing that is no string": ({"timestep_respacing": 250}, ["250", "ddim25"]),
    "respacing by no ddim steps": ({"timestep_respacing": "ddim0"}, ["ddim0"]),
    "negative respacing": ({"timestep_respacing": "-3"}, ["-3"]),
    "eta of ddpm": ({"eta": 0.5}, ["0.5", "DDIMScheduler"]),
    "eta out of range": ({"eta": 1.5}, ["1.5", "[0, 1]"]),
    "eta of another type": ({"eta": True}, ["True", "[0, 1]"]),
    "output type": ({"output_type": "jpeg"}, ["jpeg", "pil"]),
    "height": ({"height": 7}, ["7", "2"]),
    "width": ({"width": 9}, ["9", "2"]),
    "height below zero": ({"height": -8}, ["-8"]),
    "height of zero": ({"height": 0}, ["0"]),
    "shape of latents": ({"latents": images(2, height=4)}, ["(2, 3, 4, 8)", "(2, 3, 8, 8)"]),
    "channels of latents": ({"latents": images(2, channels=1)}, ["(2, 1, 8, 8)", "(2, 3, 8, 8)"]),
    "latents that are no numbers": ({"latents": images(2).log()}, ["latents", "finite"]),
    "callback's tensors": ({"callback_on_step_end_tensor_inputs": ["latent"]}, ["latent", "latents"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_with_what_was_given_and_what_is_allowed(name):
    call, messages = BAD_CALLS[name]
    refused(tiny_pipeline(id2label=NAMES), *messages, **call)


@pytest.mark.parametrize("name", ["unet", "classifier", "weaker"])
def test_dropout_is_refused(name):
    model = tiny_classifier(dropout=0.1) if name == "classifier" else tiny_unet(use_null_class=True, dropout=0.1)
    parts = {} if name == "weaker" else {name: model}
    pipeline, call = tiny_pipeline(**parts), {"weaker": model, "cfg_weight": 1.0} if not parts else {}
    assert draw(pipeline, **call).isfinite().all()
    model.train()
    refused(pipeline, f"The {name} must be in eval mode", **call)


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(5)])
def test_a_network_of_a_guidance_function_stays_in_its_mode(layer):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 5), layer)
    guide = CleanClassifierGuidance(network)
    assert network.training
    other = CleanClassifierGuidance(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE**2, 5)))
    call = {"guidance_fn": WeightedSum(other, guide, other), "guidance_scale": 1.0}
    refused(tiny_pipeline(), "The network 2 (Sequential) of `guidance_fn` must be in eval mode", **call)
    network.eval()
    assert draw(tiny_pipeline(), **call).isfinite().all()


def test_name_without_names_is_refused():
    refused(tiny_pipeline(), "goldfish", "id2label", class_labels=["goldfish", "ray"])


def test_scale_without_classifier_is_refused():
    refused(tiny_pipeline(with_classifier=False), "1.5", "classifier", guidance_scale=1.5)
    refused(tiny_pipeline(with_classifier=False), "classifier", guidance_scale=[0.0, 2.0])


def test_scale_without_classifier_that_a_callback_sets_is_refused():
    pipeline = tiny_pipeline(with_classifier=False)

    def callback(called, step, timestep, kwargs):
        called._guidance_scale = 2.0
        return kwargs

    with pytest.raises(ValueError, match="classifier"):
        draw(pipeline, guidance_scale=None, callback_on_step_end=callback)


def test_labels_for_models_without_classes_are_refused():
    refused(tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False), "class", guidance_scale=None)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_respacing_of_a_scheduler_that_places_its_own_steps_is_refused(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    refused(pipeline, "ddim25", "DDPMScheduler", scheduler_class.__name__, timestep_respacing="ddim25")


@pytest.mark.parametrize("scheduler_class", [IPNDMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_unsupported_scheduler_is_refused_with_the_list_that_is(scheduler_class):
    pipeline = tiny_pipeline()
    for attempt in (
        lambda: tiny_pipeline(scheduler=scheduler_class()),
        lambda: draw(setattr(pipeline, "scheduler", scheduler_class()) or pipeline),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert scheduler_class.__name__ in str(error.value)
        for supported in SUPPORTED_SCHEDULERS:
            assert supported.__name__ in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
    ],
)
def test_scheduler_config_that_cannot_be_sampled_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(scheduler=tiny_scheduler(DDPMScheduler, **config)))


@pytest.mark.parametrize(
    "classifier, message",
    [
        ({"sample_size": 16, "attention_resolutions": (8,)}, "`sample_size`, but got 8 and 16"),
        ({"in_channels": 1}, "`in_channels`, but got 3 and 1"),
    ],
)
def test_classifier_and_unet_that_differ_are_refused(classifier, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(classifier=tiny_classifier(**classifier))


def test_runge_kutta_steps_of_pndm_are_refused():
    with pytest.raises(ValueError, match="skip_prk_steps=False"):
        tiny_pipeline(scheduler=tiny_scheduler(PNDMScheduler, skip_prk_steps=False))


def test_learned_variance_that_the_unet_does_not_give_is_refused():
    with pytest.raises(ValueError, match="learned_range.*out_channels=3"):
        tiny_pipeline(tiny_unet(out_channels=3))


def test_upsampler_is_refused():
    with pytest.raises(ValueError, match="low_res_conditioning"):
        tiny_pipeline(tiny_unet(low_res_conditioning=True))


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, UniPCMultistepScheduler])
def test_images_that_are_not_finite_are_refused(scheduler_class):
    """Weights with NaN are refused without guidance too. They would draw black pictures."""
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    latents = images(2)
    with torch.no_grad():
        pipeline.unet.class_embedding.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"Images \[1\] of 2 are not finite"):
        draw(pipeline, latents=latents, guidance_scale=0.0)
