"""The tab Compare: two settings on the same seeds."""

from collections.abc import Iterator
from itertools import zip_longest

import gradio as gr
import torch
from gradio.components import Component
from PIL import Image

from diffusers_adm.data.grids import grid_of
from diffusers_adm.page.controls import (
    class_control,
    class_number,
    result_picture,
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
from diffusers_adm.page.pictures import enlarged


MAX_IMAGES = 16
COLUMNS = 4
GRID_SIDE = 512  # pixels


def build_compare(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    gr.Markdown("Both sides draw from the same seeds, so that every difference comes from the settings.")
    with gr.Row():
        label = class_control(model, "Class", index=3)
        count = gr.Slider(1, MAX_IMAGES, value=8, step=1, precision=0, label="Images")
        seed = seed_control("First seed")
    with gr.Row():
        sides = [build_side(model, *side) for side in (("A", 0.0), ("B", 3.0))]
    buttons = RunButtons("Compare")
    with gr.Row():
        pictures = [result_picture(f"Images of {name}") for name in "AB"]
    status = status_line()

    def run(
        class_name: str,
        count: int,
        seed: int,
        scale_a: float,
        told_a: bool,
        solver_a: str,
        steps_a: int,
        scale_b: float,
        told_b: bool,
        solver_b: str,
        steps_b: int,
    ) -> Iterator[tuple]:
        shared = (class_number(model, class_name), count, seed)
        left = draw_side(model, *shared, scale_a, told_a, solver_a, steps_a)
        right = draw_side(model, *shared, scale_b, told_b, solver_b, steps_b)
        yield from side_by_side(left, right)

    buttons.start(run, [label, count, seed, *sides[0], *sides[1]], [*pictures, status], api_name="compare")


def build_side(model: PageModel, name: str, scale: float) -> list[Component]:
    """Adds the controls of one side, and returns them."""
    with gr.Column():
        gr.Markdown(f"### {name}")
        return [
            scale_control(model, scale, f"Guidance scale of {name}"),
            told_control(model, label=f"Tell the UNet the class in {name}"),
            scheduler_control(model, f"Solver of {name}"),
            steps_control(model, 25, label=f"Steps of {name}"),
        ]


def draw_side(
    model: PageModel,
    label: int | None,
    count: int,
    seed: int,
    guidance_scale: float,
    told: bool,
    solver: str,
    steps: int,
) -> Iterator[tuple[Image.Image, torch.Tensor, str]]:
    """
    Draws images of one setting. Image number i has the seed `seed + i`.

    Args:
        model: Model that draws.
        label: Number of the class, or `None` for a model without classes.
        count: Number of images.
        seed: Seed of the first image.
        guidance_scale: Guidance scale.
        told: Whether the UNet is told the class.
        solver: Name of the scheduler.
        steps: Number of steps.

    Yields:
        Grid of the images so far, the images in [-1, 1], and the progress of the run.
    """
    call = {} if label is None else {"class_labels": [label] * count}
    generator = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    pipeline = model.pipeline(solver)
    for step in pipeline.steps(
        guidance_scale=guidance_scale,
        condition_unet=told,
        num_inference_steps=steps,
        batch_size=count,
        generator=generator,
        **call,
    ):
        last = step.index + 1 == step.num_steps
        images = step.latents.clamp(-1, 1) if last else step.x_0
        yield grid_of(step.images if last else step.x_0_images, COLUMNS), images, progress_of(step)


def side_by_side(left: Iterator[tuple], right: Iterator[tuple]) -> Iterator[tuple[Image.Image, Image.Image, str]]:
    """Runs both sides in turns, and says at the end how much their images differ."""
    a = b = None
    for next_a, next_b in zip_longest(left, right):
        a, b = next_a or a, next_b or b
        yield enlarged(a[0], GRID_SIDE), enlarged(b[0], GRID_SIDE), f"A: {a[2].lower()}. B: {b[2].lower()}."
    difference = (a[1] - b[1]).abs().mean() / 2
    yield (
        enlarged(a[0], GRID_SIDE),
        enlarged(b[0], GRID_SIDE),
        f"Done. The images differ by {difference:.1%} per pixel on average.",
    )
