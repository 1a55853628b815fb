"""The tab Trade-off: what a larger guidance scale gains, and what it costs."""

import math
from collections.abc import Iterator

import gradio as gr
import torch
from PIL import Image

from diffusers_adm.data.grids import labelled_grid
from diffusers_adm.page.charts import line_chart
from diffusers_adm.page.controls import (
    MAX_SCALE,
    class_control,
    class_number,
    result_picture,
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


SCALES = [0, 0.5, 1, 2, 5, 10, MAX_SCALE]
MAX_ROWS = 8


def build_tradeoff(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    if not model.is_guided:
        gr.Markdown("This model has no classifier, and therefore no guidance scale.")
        return
    gr.Markdown(
        "Each row starts from the same noise, and each column has its guidance scale. A larger scale makes the images fit their class"
        " better, and makes them more alike. The effect is clearest if the UNet is not told the class."
    )
    with gr.Row():
        label = class_control(model, "Class", index=3)
        rows = gr.Slider(2, MAX_ROWS, value=5, step=1, precision=0, label="Rows")
        seed = seed_control("First seed")
    scales = gr.CheckboxGroup(SCALES, value=[0, 1, 2, 5, 10], type="value", label="Guidance scales")
    with gr.Row():
        solver, steps = scheduler_control(model), steps_control(model, 10)
    told = told_control(model, value=False)
    buttons = RunButtons("Draw")
    picture, status = result_picture("The same noise in each row"), status_line()
    with gr.Row():
        share, diversity = gr.HTML(), gr.HTML()

    def run(
        class_name: str, rows: int, seed: int, scales: list[float], solver: str, steps: int, told: bool
    ) -> Iterator[tuple]:
        yield from trade_off(model, class_number(model, class_name), rows, seed, scales, solver, steps, told)

    controls = [label, rows, seed, scales, solver, steps, told]
    buttons.start(run, controls, [picture, status, share, diversity], api_name="trade_off")


def trade_off(
    model: PageModel,
    label: int,
    rows: int,
    seed: int,
    scales: list[float],
    solver: str,
    steps: int,
    told: bool,
) -> Iterator[tuple[Image.Image, str, str, str]]:
    """
    Draws images of one class from the same noises with several guidance scales.

    Args:
        model: Model that draws.
        label: Number of the class.
        rows: Number of noises.
        seed: Seed of the first row. Row number i has the seed `seed + i`.
        scales: Guidance scales.
        solver: Name of the scheduler.
        steps: Number of steps.
        told: Whether the UNet is told the class.

    Yields:
        Grid of the images so far, the progress of the run, and the charts of the share judged right and of the diversity.

    Raises:
        ValueError: If fewer than two scales are chosen.
    """
    scales = sorted(scales)
    if len(scales) < 2:
        raise ValueError("Choose at least two guidance scales.")
    pipeline, count = model.pipeline(solver), rows * len(scales)
    for step in pipeline.steps(
        class_labels=[label] * count,
        guidance_scale=[scale for scale in scales for _ in range(rows)],
        num_inference_steps=steps,
        condition_unet=told,
        generator=[torch.Generator().manual_seed(seed + row) for _ in scales for row in range(rows)],
    ):
        last = step.index + 1 == step.num_steps
        images = (step.latents if last else step.x_0).unflatten(0, (len(scales), rows))
        pictures = step.images if last else step.x_0_images
        grid = labelled_grid(
            [f"seed {seed + row}" for row in range(rows)],
            [f"{scale:g}" for scale in scales],
            [pictures[row::rows] for row in range(rows)],
            zoom=max(1, 64 // model.size),
        )
        right = [judged_share(pipeline.classifier, column, label) for column in images]
        distances = [mean_distance(column) for column in images]
        yield enlarged(grid), "Done." if last else progress_of(step), *scale_charts(scales, right, distances)


@torch.no_grad()
def judged_share(classifier: torch.nn.Module, images: torch.Tensor, label: int) -> float:
    """
    Returns the share of images whose most likely class is the given class. The noise-aware classifier is given timestep 0, because
    the images have no noise.

    Args:
        classifier: Classifier that judges.
        images: Images in [-1, 1], `(batch, channels, height, width)`.
        label: Number of the class.
    """
    timesteps = torch.zeros(len(images), dtype=torch.long, device=images.device)
    logits = classifier(images.to(classifier.dtype), timesteps).logits  # (batch, num_classes)
    return (logits.argmax(dim=1) == label).float().mean().item()


def mean_distance(images: torch.Tensor) -> float:
    """Returns the mean distance of all pairs of images, `(batch, channels, height, width)`, as a root mean square per pixel."""
    flat = images.clamp(-1, 1).flatten(1)
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


def scale_charts(scales: list[float], right: list[float], distances: list[float]) -> tuple[str, str]:
    """Returns the charts of the share judged right and of the diversity, over evenly spaced scales."""
    axis = {
        "x_label": "guidance scale",
        "x_ticks": [(place, f"{scale:g}") for place, scale in enumerate(scales)],
        "x_range": (0, len(scales) - 1),
    }
    share = line_chart("Share judged right by the guiding classifier itself", {"share": [*enumerate(right)]}, **axis)
    title = "Diversity: mean distance of two images, per pixel"
    return share, line_chart(
        title, {"distance": [*enumerate(distances)]}, y_top=math.ceil(10 * max(distances)) / 10, **axis
    )
