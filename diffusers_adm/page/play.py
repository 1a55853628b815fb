"""The tab Play, which draws images of chosen classes and shows them while they are drawn."""

import time
from collections.abc import Iterator

import gradio as gr
import torch

from diffusers_adm.page.code import call_code
from diffusers_adm.page.controls import (
    scale_control,
    scheduler_control,
    seed_control,
    status_line,
    steps_control,
    told_control,
)
from diffusers_adm.page.editing import progress_of
from diffusers_adm.page.events import RunButtons
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.pictures import distinct


MAX_IMAGES = 64
MOST_BOXES = 12  # largest number of classes that are offered as boxes instead of in a list
SECONDS_BETWEEN_PICTURES = 0.4  # a browser needs more time to show many pictures than a step takes


def build_play(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    with gr.Row():
        classes = classes_control(model)
        count = gr.Slider(1, 16, value=2, step=1, precision=0, label="Images per class" if model.classes else "Images")
    with gr.Row():
        scale, steps = scale_control(model, 2.0), steps_control(model, 10)
    with gr.Row():
        solver, seed = scheduler_control(model), seed_control("First seed")
    told = told_control(model)
    buttons = RunButtons("Draw")
    gallery = gr.Gallery(
        label="Images",
        format="png",
        columns=5,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=[
            "download",
            "download_all",
            "fullscreen",
        ],  # no button for sharing, because it would upload the images
        elem_classes="pixelated",
    )
    status = status_line()
    code = gr.Code(language="python", label="The same images in Python", interactive=False)

    def run(
        class_names: list[str],
        count: int,
        guidance_scale: float,
        steps: int,
        solver: str,
        seed: int,
        told: bool,
    ) -> Iterator[tuple]:
        yield from play(model, class_names, count, guidance_scale, steps, solver, seed, told)

    controls = [classes, count, scale, steps, solver, seed, told]
    buttons.start(run, controls, [gallery, status, code], api_name="play")


def classes_control(model: PageModel) -> gr.CheckboxGroup | gr.Dropdown:
    """Returns a control whose value is a list of names of classes. It is not shown for a model without classes."""
    if len(model.classes) <= MOST_BOXES:
        return gr.CheckboxGroup(model.classes, value=model.classes, label="Classes", visible=bool(model.classes))
    return gr.Dropdown(
        model.classes, value=model.classes[:4], multiselect=True, max_choices=MAX_IMAGES, label="Classes"
    )


def play(
    model: PageModel,
    class_names: list[str],
    count: int,
    guidance_scale: float,
    steps: int,
    solver: str,
    seed: int,
    told: bool,
) -> Iterator[tuple[list, str, str]]:
    """
    Draws images of classes. Image number i has the seed `seed + i`.

    Args:
        model: Model that draws.
        class_names: Names of the classes. They have no effect for a model without classes.
        count: Number of images per class.
        guidance_scale: Guidance scale.
        steps: Number of steps.
        solver: Name of the scheduler.
        seed: Seed of the first image.
        told: Whether the UNet is told the class.

    Yields:
        Pictures with their captions, the progress of the run, and code that draws the same images.

    Raises:
        ValueError: If no class is chosen, or there are too many images.
    """
    if model.classes and not class_names:
        raise ValueError("Choose at least one class.")
    names = [name for name in class_names for _ in range(count)] if model.classes else [""] * count
    if len(names) > MAX_IMAGES:
        raise ValueError(f"At most {MAX_IMAGES} images can be drawn at once, but {len(names)} were chosen.")
    call = {"class_labels": [model.classes.index(name) for name in names]} if model.classes else {}
    call |= {"guidance_scale": guidance_scale, "num_inference_steps": steps, "condition_unet": told}
    if not model.classes:
        call["batch_size"] = count
    seeds = range(seed, seed + len(names))
    code = call_code(model, solver, seeds, **call)
    shown, generators = time.monotonic(), [torch.Generator().manual_seed(number) for number in seeds]
    for step in model.pipeline(solver).steps(generator=generators, **call):
        last = step.index + 1 == step.num_steps
        if last or time.monotonic() - shown >= SECONDS_BETWEEN_PICTURES:
            shown = time.monotonic()
            images = step.images if last else step.x_0_images
            pictures = [(distinct(image), name) for image, name in zip(images, names)]
            yield pictures, "Done." if last else progress_of(step), code
