"""Outputs of a call: types of images, their sizes, and latents that are given."""

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_calls import SCALE, STEPS, differ, draw, seeded, solver_pipeline
from tiny_models import SIZE, images, tiny_classifier, tiny_pipeline, tiny_unet


def test_output_types_hold_the_same_images():
    pipeline = tiny_pipeline()
    latent, pt, array, pil = (draw(pipeline, output_type=name) for name in ("latent", "pt", "np", "pil"))
    assert latent.dtype == torch.float32
    assert pt.shape == (2, 3, SIZE, SIZE) and torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, SIZE, SIZE, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert pt.min() >= 0 and pt.max() <= 1
    assert [type(image) for image in pil] == [Image.Image] * 2
    for image, expected in zip(pil, array, strict=True):
        assert image.mode == "RGB" and image.size == (SIZE, SIZE)
        assert np.array_equal(np.asarray(image), (expected * 255).round().astype("uint8"))


def test_one_channel_gives_grey_images():
    pipeline = tiny_pipeline(tiny_unet(in_channels=1, out_channels=2), classifier=tiny_classifier(in_channels=1))
    assert draw(pipeline).shape == (2, 1, SIZE, SIZE)
    array = draw(pipeline, output_type="np")
    assert array.shape == (2, SIZE, SIZE, 1)
    pil = draw(pipeline, output_type="pil")
    assert [image.mode for image in pil] == ["L", "L"]
    assert np.array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round().astype("uint8"))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_other_channels_are_no_pictures(channels):
    """The default output type is refused before the first step, because two and four channels would become transparent pictures."""
    unet = tiny_unet(in_channels=channels, out_channels=2 * channels)
    pipeline, steps = tiny_pipeline(unet, with_classifier=False), []
    unet.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match=f"1 or 3 channels, but the UNet has {channels}"):
        pipeline([1])
    assert not steps
    assert draw(pipeline, guidance_scale=0.0, output_type="np").shape == (2, SIZE, SIZE, channels)


def test_return_dict_false_gives_a_tuple():
    pipeline = tiny_pipeline()
    output = pipeline(
        [1, 3],
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        generator=seeded(),
        output_type="latent",
        return_dict=False,
    )
    assert type(output) is tuple and len(output) == 1
    assert torch.equal(output[0], draw(pipeline))


def test_default_output_is_pil():
    assert isinstance(tiny_pipeline()(1, num_inference_steps=1).images[0], Image.Image)


def test_height_and_width_may_differ_from_the_default():
    pipeline = tiny_pipeline(classifier=tiny_classifier("adaptive"))
    assert draw(pipeline, height=4, width=12).shape == (2, 3, 4, 12)
    assert draw(pipeline, output_type="pil", height=4, width=12)[0].size == (12, 4)
    latents = images(2, height=4, width=12)
    assert draw(pipeline, height=4, width=12, latents=latents).shape == latents.shape


def test_size_that_the_attention_pool_does_not_take_is_refused():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="`height` and `width` must be 8 with guidance by this classifier"):
        draw(pipeline, height=16, width=16)
    assert draw(pipeline, height=16, width=16, guidance_scale=0).shape == (2, 3, 16, 16)


def test_latents_that_are_given_are_where_the_run_starts():
    pipeline, _ = solver_pipeline("ddim")
    latents = images(2)
    kept = latents.clone()
    assert torch.equal(draw(pipeline, latents=latents, generator=seeded(1)), draw(pipeline, latents=latents))
    assert torch.equal(latents, kept)
    assert differ(draw(pipeline, latents=latents), draw(pipeline))
    half = draw(pipeline, latents=latents.half())
    assert half.dtype == torch.float32 and torch.equal(half, draw(pipeline, latents=latents.half().float()))
