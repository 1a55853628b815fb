"""The tab Path: one image, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import gradio as gr
import torch
from PIL import Image

from diffusers_adm.page.charts import line_chart
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
from diffusers_adm.page.events import RunButtons
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.pictures import enlarged
from diffusers_adm.pipelines.sampling_steps import SamplingStep


MAX_STEPS = 100
MOST_LINES = 10
HOUR = 3600
PERCENT = {"minimum": 0, "maximum": 100, "step": 1, "precision": 0}
# Dragging across the chart chooses the interval. The two sliders do the same by keyboard.
DRAG = """
let start = null;
const plot = () => element.querySelector('.plot').getBoundingClientRect();
const place = (event) => Math.min(1, Math.max(0, (event.clientX - plot().left) / plot().width));
const ends = (event) => [start, place(event)].sort((a, b) => a - b);
element.addEventListener('pointerdown', (event) => {
    if (!event.target.closest('svg')) return;
    start = place(event);
    element.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', (event) => {
    if (start === null) return;
    const [first, last] = ends(event), whole = element.querySelector('.plot'), shaded = element.querySelector('.shaded');
    shaded.setAttribute('x', +whole.getAttribute('x') + first * whole.getAttribute('width'));
    shaded.setAttribute('width', (last - first) * whole.getAttribute('width'));
});
element.addEventListener('pointerup', (event) => {
    if (start === null) return;
    const [first, last] = ends(event);
    start = null;
    if (last - first >= 0.01) trigger('drag', {first: first, last: last});
});
element.addEventListener('pointercancel', () => { start = null; });
"""


@dataclass
class Path:
    """
    Steps of one image.

    Args:
        class_name: Name of the class that is drawn, or `None` for a model without classes.
        interval: Part of the run in which guidance acts, `(first, last)`, as fractions of its steps.
        names: Names of the classes that the classifier knows.
        num_steps: Number of steps of the run.
        pictures: Pictures of x_t, of the predicted x_0 and of the gradient, per step.
        sigmas: Noise level of each step.
        guided: Whether each step was guided.
        beliefs: Probability of each class by the classifier, per step. The list is empty without a classifier.
    """

    class_name: str | None
    interval: tuple[float, float]
    names: list[str]
    num_steps: int = 1
    pictures: list[tuple[Image.Image, Image.Image, Image.Image]] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    guided: list[bool] = field(default_factory=list)
    beliefs: list[list[float]] = field(default_factory=list)

    def add(self, step: SamplingStep, x_t: Image.Image) -> None:
        """Adds a step, and the picture of its x_t."""
        self.num_steps = step.num_steps
        self.pictures.append((x_t, step.x_0_images[0], gradient_picture(step.gradient, x_t.size)))
        self.sigmas.append(step.sigma)
        self.guided.append(step.gradient is not None)
        if step.log_probabilities is not None:
            self.beliefs.append(step.log_probabilities[0].exp().tolist())

    def shown(self) -> list[int]:
        """Returns the numbers of at most ten classes to show: the drawn class, and the classes with the highest probability at any step."""
        peaks = [max(column) for column in zip(*self.beliefs)]
        highest = sorted(range(len(peaks)), key=lambda number: (self.names[number] != self.class_name, -peaks[number]))
        return sorted(highest[:MOST_LINES])

    def chart(self, index: int) -> str:
        """Returns the chart of the beliefs, with a step marked."""
        if not self.beliefs:
            return ""
        lines = {
            self.names[number]: [(step / self.num_steps, belief[number]) for step, belief in enumerate(self.beliefs)]
            for number in self.shown()
        }
        every = max(1, self.num_steps // 5)
        ticks = [
            (step / self.num_steps, f"{sigma:.0f}" if sigma >= 100 else f"{sigma:.2g}")
            for step, sigma in enumerate(self.sigmas)
        ][::every]
        return line_chart(
            "What the classifier believes at each step",
            lines,
            "noise level, from noise to image",
            ticks,
            (0.0, 1.0),
            emphasised=self.class_name,
            shaded=self.interval,
            marked=index / self.num_steps,
        )

    def words(self, index: int) -> str:
        """Returns a sentence about a step."""
        said = f"Step {index + 1} of {self.num_steps}, noise level {self.sigmas[index]:.3g}"
        if self.beliefs and self.class_name in self.names:
            said += f", p({self.class_name} | x_t) = {self.beliefs[index][self.names.index(self.class_name)]:.3f}"
        return f"{said}, {'guided' if self.guided[index] else 'not guided'}."

    def view(self, index: int) -> tuple:
        """Returns three pictures, the chart and a sentence of a step."""
        return *(enlarged(picture) for picture in self.pictures[index]), self.chart(index), self.words(index)


def gradient_picture(gradient: torch.Tensor | None, size: tuple[int, int]) -> Image.Image:
    """
    Returns a picture of a gradient, averaged over channels. Guidance makes red pixels brighter and blue pixels darker. The largest
    value has the full colour. The picture of a step that was not guided is grey.

    Args:
        gradient: Gradient of one image, `(1, channels, height, width)`, or `None`.
        size: Width and height in pixels.
    """
    if gradient is None:
        return Image.new("RGB", size, "#cccccc")
    values = gradient[0].mean(dim=0)
    values = values / values.abs().max().clamp(min=1e-30)  # (height, width), in [-1, 1]
    white = 1 - values.abs()
    red, blue = torch.where(values > 0, 1.0, white), torch.where(values > 0, white, 1.0)
    pixels = (255 * torch.stack([red, white, blue], dim=-1)).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


def build_path(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    with gr.Row():
        label, seed = class_control(model, "Class", index=3), seed_control()
        solver = scheduler_control(model)
    with gr.Row():
        scale, steps = scale_control(model, 5.0), steps_control(model, 25, MAX_STEPS)
    told = told_control(model, value=False)
    with gr.Row(visible=model.is_guided):
        begin = gr.Slider(**PERCENT, value=0, label="Guidance begins at (% of the run)")
        end = gr.Slider(**PERCENT, value=100, label="Guidance ends at (% of the run)")
    buttons = RunButtons("Draw")
    position = gr.Slider(1, MAX_STEPS, value=1, step=1, precision=0, label="Step to look at")
    with gr.Row():
        names = ("Noised image x_t", "Predicted x_0", "Gradient")
        pictures = [result_picture(name) for name in names]
    status = status_line()
    if model.is_guided:
        gr.Markdown(
            "The gradient makes red pixels brighter and blue pixels darker. Guidance acts in the shaded part of the chart. Drag across"
            " the chart, or move the two sliders, to change it."
        )
    chart = gr.HTML(js_on_load=DRAG)
    record = gr.State(None, time_to_live=HOUR)

    def run(
        class_name: str,
        seed: int,
        solver: str,
        guidance_scale: float,
        steps: int,
        told: bool,
        begin: int,
        end: int,
    ) -> Iterator[tuple]:
        label, interval = class_number(model, class_name) if model.classes else None, (begin / 100, end / 100)
        for path in follow(model, label, seed, solver, guidance_scale, steps, told, interval):
            taken = len(path.pictures)
            yield *path.view(taken - 1), path, gr.Slider(value=taken, maximum=path.num_steps)

    def show(path: Path | None, position: int) -> tuple:
        return (gr.skip(),) * 5 if path is None else path.view(min(position, len(path.pictures)) - 1)

    shown = [*pictures, chart, status]
    quick = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    position.input(show, [record, position], shown, trigger_mode="always_last", **quick)
    dragged = chart.drag(interval_of_drag, None, [begin, end], **quick)
    controls, outputs = [label, seed, solver, scale, steps, told, begin, end], [*shown, record, position]
    buttons.start(run, controls, outputs, api_name="path", also=[begin.release, end.release, dragged.then])


def interval_of_drag(event: gr.EventData) -> tuple[int, int]:
    """Returns the values of the sliders for an interval that was dragged across the chart."""
    return round(100 * event.first), round(100 * event.last)


def follow(
    model: PageModel,
    label: int | None,
    seed: int,
    solver: str,
    guidance_scale: float,
    steps: int,
    told: bool,
    interval: tuple[float, float],
) -> Iterator[Path]:
    """
    Draws one image, and yields its path after each step.

    Args:
        model: Model that draws.
        label: Number of the class, or `None` for a model without classes.
        seed: Seed of the image.
        solver: Name of the scheduler.
        guidance_scale: Guidance scale.
        steps: Number of steps.
        told: Whether the UNet is told the class.
        interval: Part of the run in which guidance acts, `(first, last)`, as fractions of its steps.

    Raises:
        ValueError: If guidance acts at no step.
    """
    if not interval[0] < interval[1]:
        raise ValueError(f"Guidance must begin before it ends, but got {interval[0]:.0%} and {interval[1]:.0%}.")
    pipeline = model.pipeline(solver)
    make_images = partial(pipeline.image_processor.postprocess, output_type="pil")
    path = Path(None if label is None else model.classes[label], interval, model.classes)
    for step in pipeline.steps(
        class_labels=None if label is None else [label],
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        condition_unet=told,
        generator=torch.Generator().manual_seed(seed),
        guidance_options={"step_fractions": interval} if guidance_scale else None,
    ):
        path.add(step, make_images(step.x_t)[0])
        yield path
