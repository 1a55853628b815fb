"""Edits of one picture, step by step."""

from collections.abc import Iterator

import torch
from PIL import Image

from diffusers_adm.examples.ddnm import agreeing_with, enlarge, shrink
from diffusers_adm.examples.repaint import jumping_timesteps, pasting
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.pictures import enlarged, model_input
from diffusers_adm.pipelines.sampling_steps import SamplingStep


Shown = Iterator[tuple[Image.Image, str]]  # picture so far, and progress of the run

JUMP_LENGTH = 10
ETA = 0.85  # of DDNM


def class_arguments(model: PageModel, label: int | None, guidance_scale: float = 0.0) -> dict:
    """
    Returns the arguments of a call that draws one image of a class.

    Args:
        model: Model that draws.
        label: Number of the class, or `None` for no class.
        guidance_scale: Guidance scale.

    Raises:
        ValueError: If there is no class to guide to.
    """
    if label is None and guidance_scale:
        raise ValueError("A guidance scale other than 0 needs a class. Choose a class, or set the scale to 0.")
    told = {"condition_unet": label is not None, "guidance_scale": guidance_scale}
    # Without a label, a random one would be drawn. With condition_unet=False and no guidance, the label has no effect.
    return told | ({"class_labels": [label or 0]} if model.classes else {})


def progress_of(step: SamplingStep) -> str:
    """Returns the progress of a run."""
    return f"Step {step.index + 1} of {step.num_steps}"


def invert(model: PageModel, picture: Image.Image, label: int | None, steps: int) -> Iterator[tuple]:
    """
    Finds the noise of a picture by DDIM in reverse, and draws it again.

    Args:
        model: Model that draws.
        picture: Picture of any size.
        label: Number of the picture's class, or `None` for no class.
        steps: Number of steps of the inversion, and also of the drawing.

    Yields:
        Noise, picture so far, and progress of the run.
    """
    pipeline, x_0 = model.pipeline("DDIM"), model_input(picture, model)
    labels = None if label is None else [label]
    noise = pipeline.invert(x_0, labels, steps)
    (noise_picture,) = pipeline.image_processor.postprocess(noise / 3)
    call = class_arguments(model, label)
    for step in pipeline.steps(latents=noise, num_inference_steps=steps, **call):
        last = step.index + 1 == step.num_steps
        pictures = step.images if last else step.x_0_images
        error = (
            f". Mean absolute error per pixel: {(step.latents.clamp(-1, 1) - x_0).abs().mean() / 2:.1%}"
            if last
            else ""
        )
        yield enlarged(noise_picture), enlarged(pictures[0]), progress_of(step) + error


def counterfactual(
    model: PageModel,
    picture: Image.Image,
    label: int | None,
    target: int | None,
    guidance_scale: float,
    steps: int,
) -> Shown:
    """
    Draws a picture as another class. DDIM in reverse finds the noise of the picture, and DDIM draws it with the other class.

    Args:
        model: Model that draws.
        picture: Picture of any size.
        label: Number of the picture's class, or `None` for no class.
        target: Number of the class to draw.
        guidance_scale: Guidance scale towards it.
        steps: Number of steps of the inversion, and also of the drawing.
    """
    pipeline, x_0 = model.pipeline("DDIM"), model_input(picture, model)
    call = class_arguments(model, target, guidance_scale)
    noise = pipeline.invert(x_0, None if label is None else [label], steps)
    for step in pipeline.steps(latents=noise, num_inference_steps=steps, **call):
        pictures = step.images if step.index + 1 == step.num_steps else step.x_0_images
        yield enlarged(pictures[0]), progress_of(step)


def inpaint(
    model: PageModel,
    picture: Image.Image,
    region: Image.Image,
    label: int | None,
    guidance_scale: float,
    steps: int,
    rounds: int,
    seed: int,
) -> Shown:
    """
    Draws a part of a picture anew by RePaint.

    Args:
        model: Model that draws.
        picture: Picture of any size.
        region: Mask of the size of the picture. The part with grey levels above 127 is drawn.
        label: Number of the class, or `None` for no class.
        guidance_scale: Guidance scale towards it.
        steps: Number of steps.
        rounds: Number of times that each stretch of steps is run. More rounds fit the new part better to the old part.
        seed: Seed of the noise.
    """
    pipeline, known = model.pipeline("DDPM"), model_input(picture, model)
    mask = (model_input(region, model)[:, :1] < 0).float()
    generator = torch.Generator().manual_seed(seed)
    timesteps = jumping_timesteps(steps, JUMP_LENGTH, rounds, pipeline.scheduler.config.num_train_timesteps)
    call = class_arguments(model, label, guidance_scale)
    paste = pasting(pipeline, known, mask, generator)
    for step in pipeline.steps(timesteps=timesteps, callback_on_step_start=paste, generator=generator, **call):
        drawn = step.latents if step.index + 1 == step.num_steps else step.x_0
        whole = mask * known + (1 - mask) * drawn
        yield enlarged(pipeline.image_processor.postprocess(whole)[0]), progress_of(step)


def super_resolve(
    model: PageModel, picture: Image.Image, factor: int, label: int | None, steps: int, seed: int
) -> Iterator[tuple]:
    """
    Shrinks a picture, and enlarges it again by DDNM.

    Args:
        model: Model that draws.
        picture: Picture of any size.
        factor: Factor by which it is shrunk.
        label: Number of the class, or `None` for no class.
        steps: Number of steps.
        seed: Seed of the noise.

    Yields:
        Shrunk picture, picture so far, and progress of the run.
    """
    pipeline = model.pipeline("DDIM")
    small = shrink(model_input(picture, model), factor)
    (small_picture,) = pipeline.image_processor.postprocess(enlarge(small, factor))
    call = {"eta": ETA, "x_0_fn": agreeing_with(small, factor), **class_arguments(model, label)}
    generator = torch.Generator().manual_seed(seed)
    for step in pipeline.steps(num_inference_steps=steps, generator=generator, **call):
        pictures = step.images if step.index + 1 == step.num_steps else step.x_0_images
        yield enlarged(small_picture), enlarged(pictures[0]), progress_of(step)
