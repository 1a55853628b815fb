"""Pipelines refuse arguments of wrong types by name. Otherwise these would crash inside, or would be misunderstood."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pipeline_calls import draw, refused, seeded
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.pipelines.cascade import draw_cascade


def upsampler(**changes) -> ADMUpsamplePipeline:
    parts = {"unet": tiny_unet(low_res_conditioning=True), "scheduler": tiny_scheduler(), "low_res_size": 4}
    pipeline = ADMUpsamplePipeline(**{**parts, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


WRONG_PARTS = [
    ("unet", None),
    ("unet", "unet"),
    ("unet", tiny_classifier()),
    ("unet", torch.nn.Linear(2, 2)),
    ("unet", type(tiny_unet())),
    ("unet", tiny_scheduler()),
    ("scheduler", None),
    ("scheduler", "DDPMScheduler"),
    ("scheduler", DDPMScheduler),
    ("scheduler", tiny_unet()),
    ("classifier", "classifier"),
    ("classifier", tiny_unet()),
    ("classifier", tiny_scheduler()),
    ("classifier", {}),
]


@pytest.mark.parametrize("name, part", WRONG_PARTS)
def test_pipeline_of_a_wrong_part_is_refused(name, part):
    parts = {"unet": tiny_unet(), "scheduler": tiny_scheduler(), "classifier": tiny_classifier()}
    said = "is not supported. Use one of DDPMScheduler" if name == "scheduler" else f"`{name}` must be an instance of"
    with pytest.raises(ValueError, match=said):
        ClassifierGuidedPipeline(**{**parts, name: part})
    with pytest.raises(ValueError, match=said):
        upsampler(**{**parts, "unet": tiny_unet(low_res_conditioning=True), name: part})


def test_part_that_takes_the_place_of_another_later_is_refused():
    pipeline = tiny_pipeline()
    pipeline.unet = tiny_classifier()
    with pytest.raises(ValueError, match="`unet` must be an instance of ADMUNet2DModel, but got NoisyClassifier"):
        draw(pipeline)


@pytest.mark.parametrize(
    "name, values",
    [
        ("guidance_scale", ["1.0", None, [1.0], torch.tensor(1.0), float("nan"), float("inf"), True]),
        ("num_inference_steps", ["25", None, 2.5, 0, -1, True]),
        ("timestep_respacing", [25, "fast", ["25"], "2000"]),
        ("low_res_size", ["4", None, 4.0, 0]),
        ("id2label", ["cat", ["cat", "dog"], {0: 1}, {0.5: "cat"}, {"a": "cat"}]),
    ],
)
def test_defaults_of_wrong_types_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            upsampler(**{name: value})


COMPLEX = images().to(torch.complex64)
META = images().to("meta")
BAD_ARGUMENTS = {
    "text for a truth value": ({"condition_unet": "no"}, "`condition_unet` must be True or False, but got 'no'"),
    "number for a truth value": ({"condition_unet": 0}, "`condition_unet` must be True or False, but got 0"),
    "text for return_dict": ({"return_dict": "no"}, "`return_dict` must be True or False, but got 'no'"),
    "truth value for a number": (
        {"batch_size": True, "class_labels": None},
        "`batch_size` must be an integer, but got True",
    ),
    "truth value for steps": ({"num_inference_steps": True}, "num_inference_steps=True"),
    "text for a scale": (
        {"guidance_scale": "1.0"},
        "`guidance_scale` must be one number, or one number per image, but got '1.0'",
    ),
    "complex scales": ({"guidance_scale": torch.tensor([1j, 2j])}, "`guidance_scale` must be one number"),
    "complex weights": ({"cfg_weight": np.array([1j, 2j])}, "`cfg_weight` must be one number"),
    "weight whose products overflow": (
        {"cfg_weight": 3e38},
        "`cfg_weight` must be finite, with an absolute value of at most 1.8e+19",
    ),
    "array of latents": ({"latents": images().numpy()}, "`latents` must be a dense tensor"),
    "complex latents": ({"latents": COMPLEX}, "torch.complex64"),
    "integer latents": ({"latents": images().long()}, "torch.int64"),
    "sparse latents": ({"latents": images().to_sparse()}, "torch.sparse_coo"),
    "latents without data": ({"latents": META}, "`latents` must hold data"),
    "latents that overflow": ({"latents": images().double() * 1e300}, "`latents` must be finite"),
    "labels without data": ({"class_labels": torch.tensor([1, 2], device="meta")}, "`class_labels` must be integers"),
    "options by numbers": ({"guidance_options": {1: 2, "every": 1}}, "`guidance_options` must have names among"),
    "names of no list": ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names"),
    "names that are numbers": ({"callback_on_step_end_tensor_inputs": 3}, "must be a list of names"),
    "names in a list of lists": ({"callback_on_step_end_tensor_inputs": [["latents"]]}, "must be a list of names"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_argument_of_another_type_is_refused_before_anything_runs(name):
    call, message = BAD_ARGUMENTS[name]
    refused(tiny_pipeline(tiny_unet(use_null_class=True)), message, **call)


@pytest.mark.parametrize("hook", ["x_0_fn", "guidance_fn", "callback_on_step_end"])
def test_complex_tensors_that_functions_return_are_refused(hook):
    def function(*arguments):
        x = arguments[3]["latents"] if hook == "callback_on_step_end" else arguments[0]
        returned = x.detach().to(torch.complex64)
        return {"latents": returned} if hook == "callback_on_step_end" else returned

    with pytest.raises(ValueError, match="(but got|returned) .*complex64"):
        draw(tiny_pipeline(), **{hook: function})


WRONG_IMAGES = {
    "array": images().numpy(),
    "list": images().tolist(),
    "complex": COMPLEX,
    "integers": images().long(),
    "sparse": images().to_sparse(),
    "no data": META,
    "one image": images()[0],
    "channels": images()[:, :1],
    "text": "image.png",
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_predict_and_invert_refuse_images_of_another_kind(name):
    wrong, small = WRONG_IMAGES[name], images(2, height=4, width=4)
    pipeline, large = tiny_pipeline(), upsampler()
    for argument, call in (
        ("sample", lambda: pipeline.predict(wrong, 5, [1, 2])),
        ("images", lambda: pipeline.invert(wrong, [1, 2], 2)),
        ("low_res", lambda: large.predict(images(), 5, [1, 2], wrong)),
        ("low_res", lambda: large.invert(images(), [1, 2], 2, wrong)),
    ):
        with pytest.raises(ValueError, match=f"`{argument}` must"):
            call()
    assert large.predict(images(), 5, [1, 2], small).x_0.isfinite().all()


@pytest.mark.parametrize("timestep", [None, "5", 1j, [1, 2, 3], {}, [[1, 2]], 1000, -1, 0.5, torch.tensor([5, 1000])])
def test_predict_refuses_timesteps_of_another_kind(timestep):
    with pytest.raises(ValueError, match="timestep"):
        tiny_pipeline().predict(images(), timestep, [1, 2])


def test_predict_takes_timesteps_as_list_or_array():
    pipeline = tiny_pipeline()
    expected = pipeline.predict(images(), torch.tensor([5, 7]), [1, 2]).x_0
    for timestep in ([5, 7], np.array([5, 7])):
        assert torch.equal(pipeline.predict(images(), timestep, [1, 2]).x_0, expected)


def test_invert_refuses_images_and_weights_that_are_not_finite():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    sample = images()
    sample[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"`images` must be in \[-1, 1\], but got values up to nan"):
        pipeline.invert(sample, [1, 2], 2)
    with pytest.raises(ValueError, match="`images` must be one or more images, but got none"):
        pipeline.invert(images()[:0], [], 2)
    with torch.no_grad():
        pipeline.unet.class_embedding.weight[1] = torch.nan
    with pytest.raises(ValueError, match=r"Images \[0\] of 2 are not finite"):
        pipeline.invert(images(), [1, 2], 2)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(2, 3, 4, 4).to(torch.complex64),
        torch.rand(2, 4, 4, 3).numpy().astype(np.complex64),
        torch.rand(2, 3, 4, 4, device="meta"),
        torch.rand(2, 3, 4, 4).to_sparse(),
        np.array([["a"]]),
        np.array([[object()]]),
        3,
        None,
    ],
)
def test_upsampler_refuses_small_images_of_another_kind(image):
    with pytest.raises(ValueError, match="`image` must be"):
        upsampler()(image, [1, 2])


def test_cascade_refuses_what_is_no_list_of_stages_or_calls():
    base = tiny_pipeline(tiny_unet(sample_size=4, attention_resolutions=(2,)), with_classifier=False)
    for stages in (base, None, [], [upsampler(), upsampler()], [None, upsampler()]):
        with pytest.raises(ValueError, match="stage"):
            draw_cascade(stages, [1])
    for calls in (1, {}, [1, 2], ["", ""]):
        with pytest.raises(ValueError, match="calls"):
            draw_cascade([base, upsampler()], [1], calls)
    for calls in ([{"output_type": "np"}, {}], [{}, {"return_dict": False}], [{}, {"image": None}]):
        with pytest.raises(ValueError, match=r"`calls` must not have \['(output_type|return_dict|image)'\] for stage"):
            draw_cascade([base, upsampler()], [1], calls)


def test_scheduler_without_learned_variance_is_refused_with_the_cure():
    config = tiny_scheduler(DDIMScheduler).config
    with pytest.raises(ValueError, match="variance_type='learned_range'"):
        tiny_pipeline(scheduler=DDPMScheduler.from_config(config))
    cured = tiny_pipeline(scheduler=DDPMScheduler.from_config(config, variance_type="learned_range"))
    assert draw(cured, generator=seeded()).isfinite().all()
    with pytest.raises(ValueError, match="variance_type='fixed_large'"):
        tiny_pipeline(tiny_unet(out_channels=3))
