"""Runs that begin with images of the caller: inversion to a timestep, `start`, `image` and `strength`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image
from pipeline_calls import draw, refused, seeded, visited
from tiny_models import SIZE, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.examples import anomaly_map, counterfactual, digits, sdedit
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


LABELS = [1, 3]
PICTURES = torch.rand(2, 3, SIZE, SIZE, generator=seeded(5))  # in [0, 1]
MEMORYLESS = [
    DDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
]
GIVEN_SIGMAS = [
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    EDMDPMSolverMultistepScheduler,
    CMStochasticIterativeScheduler,
]


def pipeline_with(scheduler_class: type, **options):
    return tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **options))


def told_sigma(scheduler_class: type):
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    return tiny_pipeline(unet, scheduler_class(), with_classifier=False)


def run(pipeline, **call) -> list:
    """All steps of a run."""
    call = {"class_labels": LABELS, "guidance_scale": 0.0, "generator": seeded(), **call}
    return list(pipeline.steps(**call))


# --- Inversion ---


def test_images_that_were_inverted_to_a_timestep_are_drawn_again():
    pipeline = tiny_pipeline(
        scheduler=tiny_scheduler(DDIMScheduler, clip_sample=False),
        unet=tiny_unet(num_class_embeds=None, out_channels=3),
    )
    x_0, call = images() / 3, {"num_inference_steps": 500, "guidance_scale": 0.0, "output_type": "latent"}
    x_t = pipeline.invert(x_0, None, 500, until=101)
    assert (x_t - x_0).abs().mean() > 0.05
    again = pipeline(latents=x_t, start=101, **call).images
    assert (again - x_0).abs().max() < 0.01


def test_digits_that_were_inverted_to_a_timestep_are_drawn_again():
    pipeline = digits.quiet_pipeline(ddim=True)
    labels = [3, 5]
    whole = digits.draw(pipeline, 2, class_labels=labels, num_inference_steps=25, guidance_scale=1.0)
    call = {"guidance_scale": 0.0, "num_inference_steps": 50, "output_type": "latent"}
    errors = []
    for until in (200, 600):
        x_t = pipeline.invert(whole, labels, 50, until=until)
        again = pipeline(labels, latents=x_t, start=until, **call).images
        errors.append((again - whole).square().mean().sqrt().item())
    assert errors[0] < errors[1] < 0.1, errors


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, HeunDiscreteScheduler])
def test_inversion_uses_the_noise_and_the_options_of_the_scheduler(scheduler_class):
    """Both may differ from the defaults of DDIM."""
    scheduler = scheduler_class()
    scheduler.register_to_config(clip_sample=False)
    betas = {name: scheduler.config[name] for name in ("beta_schedule", "beta_start", "beta_end")}
    same = DDIMScheduler(clip_sample=False, **betas)
    unet = tiny_unet()
    found, expected = (
        tiny_pipeline(unet, one, with_classifier=False).invert(images(), LABELS, 5) for one in (scheduler, same)
    )
    assert torch.equal(found, expected)


def test_pixels_of_8_bits_are_not_inverted():
    with pytest.raises(ValueError, match=r"`images` must be in \[-1, 1\], but got values up to 255"):
        tiny_pipeline().invert(255 * torch.ones(2, 3, SIZE, SIZE), LABELS, 5)


def test_inversion_with_dropout_is_refused():
    pipeline = tiny_pipeline(tiny_unet(dropout=0.1).train())
    with pytest.raises(ValueError, match="The unet must be in eval mode"):
        pipeline.invert(images(), LABELS, 5)


def test_inversion_thresholds_as_sampling_does():
    pipeline = pipeline_with(DDIMScheduler, clip_sample=False, thresholding=True)
    given = images().clamp(-1, 1)
    noise = pipeline.invert(given, LABELS, 250)
    again = draw(pipeline, LABELS, latents=noise, num_inference_steps=250, guidance_scale=0.0)
    assert (again - given).square().mean().sqrt() < 0.1


def test_inversion_ends_at_the_highest_visited_timestep_that_is_at_most_until():
    pipeline = pipeline_with(DDIMScheduler)  # 4 steps visit 750, 500, 250, 0
    ends = [pipeline.invert(images(), LABELS, 4, until=until) for until in (499, 250, torch.tensor(251.0), 249)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[3])
    trailing = pipeline_with(DDIMScheduler, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="`until` must be at least 249, the lowest timestep of the run, but got 248"):
        trailing.invert(images(), LABELS, 4, until=248)
    for until in (-1, 1000, "500", float("nan")):
        with pytest.raises(ValueError, match=r"`until` must be a training timestep in \[0, 999\]"):
            pipeline.invert(images(), LABELS, 4, until=until)


# --- Noise levels ---


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_images_are_noised_to_the_level_of_the_timestep(scheduler_class):
    pipeline = pipeline_with(scheduler_class)
    options = {"timestep_respacing": "4,3,5"} if scheduler_class is DDPMScheduler else {"num_inference_steps": 12}
    first = run(pipeline, image=PICTURES, start=500, **options)[0]
    noise = torch.randn(PICTURES.shape, generator=seeded())
    levels = NoiseSchedule.from_config(pipeline.scheduler.config).sigma.log()
    timestep = first.timestep.item()
    assert 300 < timestep <= 500
    below = int(timestep)  # some schedulers visit timesteps between those of the training
    sigma = torch.lerp(levels[below], levels[below + 1], timestep - below).exp().item()
    precision = 1e-6 if below == timestep else 1e-4
    expected = ((2 * PICTURES - 1).double() + sigma * noise) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(first.x_t.double(), expected, rtol=0, atol=precision)
    assert first.sigma == pytest.approx(sigma, rel=precision)


@pytest.mark.parametrize("scheduler_class", GIVEN_SIGMAS)
def test_images_are_noised_to_the_noise_level_that_the_unet_is_given(scheduler_class):
    pipeline, seen = told_sigma(scheduler_class), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    churn = {"churn": {"s_churn": 3}} if scheduler_class is HeunDiscreteScheduler else {}
    run(pipeline, image=PICTURES, start=2.0, num_inference_steps=8, **churn)
    noised, sigma = seen[0]
    assert 0.1 < sigma[0] <= 2
    expected = (2 * PICTURES - 1).double() + sigma[0].double() * torch.randn(PICTURES.shape, generator=seeded())
    torch.testing.assert_close(noised.double(), expected, rtol=0, atol=1e-5)


# --- Steps that are left out ---


@pytest.mark.parametrize("scheduler_class", MEMORYLESS)
def test_a_run_goes_on_from_its_middle(scheduler_class):
    pipeline = pipeline_with(scheduler_class)
    generator = seeded()
    for step in pipeline.steps(LABELS, num_inference_steps=6, generator=generator, output_type="latent"):
        if step.index == 4:
            break
        state = generator.get_state()
    rest = torch.Generator()
    rest.set_state(state)
    call = {"latents": step.x_t, "start": step.timestep, "generator": rest}
    again = run(pipeline, num_inference_steps=6, guidance_scale=1.0, **call)
    whole = run(pipeline, num_inference_steps=6, guidance_scale=1.0)
    assert again[0].num_steps == whole[0].num_steps - 4
    torch.testing.assert_close(again[-1].latents, whole[-1].latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler_class", GIVEN_SIGMAS)
def test_a_run_over_noise_levels_goes_on_from_its_middle(scheduler_class):
    """A multistep solver starts with a step of first order, so its images are only close to those of the whole run."""
    pipeline = told_sigma(scheduler_class)
    whole = run(pipeline, num_inference_steps=10)
    step = whole[4]
    again = run(pipeline, num_inference_steps=10, latents=step.x_t, start=step.timestep)
    assert [one.sigma for one in again] == [one.sigma for one in whole[4:]]
    if scheduler_class in (HeunDiscreteScheduler, KDPM2DiscreteScheduler):  # without noise
        torch.testing.assert_close(again[-1].latents, whole[-1].latents, rtol=1e-5, atol=1e-5)


def test_a_run_begins_at_a_listed_noise_level_that_float32_rounds_up():
    call = {"sigmas": [20.0, 5.0, 0.8, 0.1], "num_inference_steps": None, "image": PICTURES}
    for pipeline in (told_sigma(HeunDiscreteScheduler), told_sigma(EulerAncestralDiscreteScheduler)):
        for level in call["sigmas"]:
            assert run(pipeline, start=level, **call)[0].sigma == pytest.approx(level)


def test_a_two_stage_method_does_not_begin_within_a_step():
    for pipeline in (pipeline_with(HeunDiscreteScheduler), told_sigma(KDPM2DiscreteScheduler)):
        whole = run(pipeline, num_inference_steps=6)
        inner = whole[5]  # second evaluation of the third step
        again = run(pipeline, num_inference_steps=6, latents=inner.x_t, start=inner.timestep)
        assert [one.sigma for one in again] == [one.sigma for one in whole[6:]]


def test_pndm_takes_its_first_step_twice_wherever_it_begins():
    pipeline = pipeline_with(PNDMScheduler)
    assert visited(pipeline, num_inference_steps=5) == [800, 600, 600, 400, 200, 0]
    noised = {"latents": images(), "num_inference_steps": 5}
    assert visited(pipeline, start=999, **noised) == [800, 600, 600, 400, 200, 0]
    assert visited(pipeline, start=799, **noised) == [600, 400, 400, 200, 0]
    assert visited(pipeline, start=200, **noised) == [200, 0, 0]
    assert visited(pipeline, start=0, **noised) == [0]
    half = {"image": PICTURES, "num_inference_steps": 10, "strength": 0.3}
    assert visited(pipeline, **half) == [200, 100, 100, 0]


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.29, 0.5, 0.75, 0.99, 1])
def test_strength_takes_as_many_steps_as_in_diffusers(strength):
    for scheduler_class in (DDPMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler):
        pipeline = pipeline_with(scheduler_class)
        steps = run(pipeline, image=PICTURES, strength=strength, num_inference_steps=20)
        stock = tiny_scheduler(scheduler_class)
        stock.set_timesteps(20)
        theirs, _ = StableDiffusionImg2ImgPipeline.get_timesteps(SimpleNamespace(scheduler=stock), 20, strength, "cpu")
        assert len(steps) == len(theirs)
        whole = run(pipeline, num_inference_steps=20)
        assert [one.sigma for one in steps] == [one.sigma for one in whole[-len(steps) :]]


def test_full_strength_is_pure_noise():
    for pipeline in (pipeline_with(DDIMScheduler), told_sigma(HeunDiscreteScheduler)):
        call = {"guidance_scale": 0.0, "num_inference_steps": 4}
        assert torch.equal(draw(pipeline, image=PICTURES, strength=1.0, **call), draw(pipeline, **call))


def test_little_strength_keeps_the_image():
    pipeline = digits.quiet_pipeline(ddim=True)
    whole = digits.draw(pipeline, 3, num_inference_steps=25, guidance_scale=1.0)
    call = {"image": (whole + 1) / 2, "num_inference_steps": 25}
    changes = [(digits.draw(pipeline, 3, strength=one, **call) - whole).abs().mean() for one in (0.1, 0.4, 0.9)]
    assert changes[0] < changes[1] < changes[2] and changes[0] < 0.05


def test_jumps_back_up_stay():
    pipeline = tiny_pipeline()
    timesteps = [900, 600, 300, 600, 300, 0]
    call = {"timesteps": timesteps, "image": PICTURES, "num_inference_steps": None}
    assert visited(pipeline, start=700, **call) == timesteps[1:]
    assert visited(pipeline, start=599, **call) == timesteps[2:]
    assert visited(pipeline, strength=0.5, **call) == timesteps[3:]


# --- Arguments ---


def test_images_are_taken_in_every_form():
    pipeline = pipeline_with(DDIMScheduler)
    bytes_ = (PICTURES * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    pil = [Image.fromarray(one) for one in bytes_]
    floats = bytes_.astype(np.float32) / 255
    tensor = torch.tensor(floats).movedim(-1, 1)
    expected = draw(pipeline, image=tensor, strength=0.7)
    for image in (pil, bytes_, floats, list(floats), list(tensor), [pil[0], floats[1]]):
        assert torch.equal(draw(pipeline, image=image, strength=0.7), expected)
    alone = draw(pipeline, 1, image=pil[0], strength=0.7)
    assert alone.shape[0] == 1
    unlabelled = pipeline(image=pil, strength=0.7, num_inference_steps=3, guidance_scale=0.0).images
    assert len(unlabelled) == 2  # the images decide how many labels are drawn


BAD = {
    "no strength": ({"image": PICTURES}, "`image` requires a `strength`"),
    "both": ({"image": PICTURES, "strength": 0.5, "start": 500}, "`start` and `strength` must not"),
    "latents": ({"image": PICTURES, "strength": 0.5, "latents": images()}, "`image` and `latents` must not"),
    "start alone": ({"start": 500}, "`start` requires images to begin with"),
    "strength alone": ({"strength": 0.5}, "`strength` requires an `image`"),
    "strength of latents": ({"strength": 0.5, "latents": images()}, "With `latents`, pass `start`"),
    "no noise": ({"image": PICTURES, "strength": 0}, "`strength` must be a number in (0, 1], but got 0"),
    "too strong": ({"image": PICTURES, "strength": 1.5}, "but got 1.5"),
    "text": ({"image": PICTURES, "strength": "0.5"}, "but got '0.5'"),
    "no step": ({"image": PICTURES, "strength": 0.3}, "`strength` must be at least 0.333"),
    "no timestep": ({"image": PICTURES, "start": 1000}, "`start` must be a training timestep in [0, 999]"),
    "fraction": ({"image": PICTURES, "start": 0.5}, "For a fraction of the steps, pass `strength`"),
    "no number": ({"image": PICTURES, "start": torch.tensor([1, 2])}, "`start` must be a training timestep"),
    "too low": ({"image": PICTURES, "start": 50, "timestep_respacing": None, "timesteps": [900, 100]}, "at least 100"),
    "size": ({"image": torch.rand(2, 3, 16, 16), "strength": 0.5}, "`image` must have the shape (2, 3, 8, 8)"),
    "channels": ({"image": torch.rand(2, 1, 8, 8), "strength": 0.5}, "`image` must have 3 channels"),
    "range": ({"image": 2 * PICTURES - 1, "strength": 0.5}, "`image` must be in [0, 1]"),
    "number": ({"image": PICTURES[:1], "strength": 0.5}, "image 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_beginnings_that_cannot_be_are_refused(name):
    call, message = BAD[name]
    refused(tiny_pipeline(), message, **call)


def test_noise_levels_are_refused_as_noise_levels():
    pipeline = told_sigma(HeunDiscreteScheduler)
    refused(pipeline, "a noise level of at least 0", image=PICTURES, start=-1.0, guidance_scale=0.0)
    refused(pipeline, "`start` must be at least", image=PICTURES, start=1e-6, guidance_scale=0.0)


def test_particles_share_an_image_and_have_noise_of_their_own():
    pipeline = tiny_pipeline()
    first = run(pipeline, image=PICTURES, strength=0.5, particles=2, guidance_scale=1.0, num_inference_steps=4)[0]
    assert first.x_t.shape[0] == 4
    noised = first.x_t - first.x_t.mean(dim=0)
    assert noised.abs().amin(dim=0).mean() > 0
    refused(pipeline, "`particles` requires that x_T is drawn", latents=images(), start=500, particles=2)


def test_callbacks_see_the_run_that_is_left():
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), pipeline.num_timesteps))
        return {}

    draw(pipeline_with(DDIMScheduler), image=PICTURES, start=500, num_inference_steps=4, callback_on_step_start=look)
    assert seen == [(0, 500, 3), (1, 250, 3), (2, 0, 3)]


# --- Examples ---


def test_a_3_becomes_an_8_that_resembles_it():
    pipeline = digits.quiet_pipeline(ddim=True)
    threes, eights = (
        digits.draw(pipeline, 3, seed, class_labels=[label] * 3, num_inference_steps=20, guidance_scale=1.0)
        for label, seed in ((3, 100), (8, 200))
    )
    changed = counterfactual.as_another_class(pipeline, threes, 3, 8, steps=20)
    with torch.no_grad():
        found = pipeline.classifier(changed, torch.zeros(3)).logits.argmax(dim=1)
    assert found.tolist() == [8, 8, 8]
    assert (changed - threes).abs().mean() < 0.8 * (eights - threes).abs().mean()


def test_spots_are_found_by_drawing_digits_again():
    pipeline, whole = digits.quiet_pipeline(ddim=True), digits.true_digits(4)
    spoilt, is_spoilt = anomaly_map.spoilt_digits(whole)
    again = anomaly_map.drawn_again(pipeline, spoilt, steps=20, repeats=2)
    assert anomaly_map.separation(anomaly_map.anomaly_map(spoilt, again), is_spoilt) > 0.85
    assert anomaly_map.separation(torch.ones_like(spoilt), is_spoilt) == 0.5


def test_printed_digits_fill_their_pictures():
    printed = sdedit.printed_digits(10)
    assert all(picture.size == (32, 32) and 0.02 < np.asarray(picture).mean() / 255 < 0.5 for picture in printed)
