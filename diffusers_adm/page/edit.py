"""The tab Edit: one picture, changed by the model."""

from collections.abc import Iterator

import gradio as gr
import torch
from gradio.components import Component
from gradio.components.image_editor import EditorValue
from PIL import Image

from diffusers_adm.page.controls import (
    class_control,
    class_number,
    result_picture,
    scale_control,
    seed_control,
    status_line,
    steps_control,
)
from diffusers_adm.page.editing import class_arguments, counterfactual, inpaint, invert, super_resolve
from diffusers_adm.page.editor import as_editor_value, edited_picture, painted_region, picture_editor
from diffusers_adm.page.events import RunButtons
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.pictures import SHOWN_SIDE, enlarged, model_picture


# Boxes (left, top, right, bottom), as fractions of the sides.
REGIONS = {
    "Lower half": (0, 0.5, 1, 1),
    "Upper half": (0, 0, 1, 0.5),
    "Left half": (0, 0, 0.5, 1),
    "Right half": (0.5, 0, 1, 1),
}
PAINTED = "What I paint"
DRAWING_STEPS = 25


def build_edit(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    if not model.is_told_timesteps:
        gr.Markdown("This model is told noise levels. Editing requires a model that is told timesteps.")
        return
    gr.Markdown("Draw or upload a picture, or let the model draw one. Then choose what to do with it.")
    with gr.Row():
        with gr.Column():
            editor = build_source(model)
        with gr.Column():
            for name, build in {
                "Inversion": build_inversion,
                "Counterfactual": build_counterfactual,
                "Inpainting": build_inpainting,
                "Super-resolution": build_super_resolution,
            }.items():
                with gr.Tab(name):
                    build(model, editor)


def build_source(model: PageModel) -> gr.ImageEditor:
    """Adds the picture to edit, and returns its editor."""
    side = max(SHOWN_SIDE, model.size)
    black = Image.new("RGB", (side, side))
    brush = gr.Brush(default_size=side // 12, colors=["#ffffff", "#000000", "#d62728", "#1f77b4", "#2ca02c"])
    editor = picture_editor("Picture", black, brush)
    with gr.Row():
        label, seed = class_control(model, "Class to draw", index=3), seed_control()

    buttons = RunButtons("Draw one")

    def draw(class_name: str, seed: int) -> Iterator[EditorValue]:
        pipeline, generator = model.pipeline("DDIM"), torch.Generator().manual_seed(seed)
        call = class_arguments(model, class_number(model, class_name), guidance_scale=float(model.is_guided))
        for step in pipeline.steps(num_inference_steps=DRAWING_STEPS, generator=generator, **call):
            pass
        yield as_editor_value(enlarged(step.images[0]))

    buttons.start(draw, [label, seed], [editor], api_name="draw")
    return editor


def build_inversion(model: PageModel, editor: gr.ImageEditor) -> None:
    """Adds inversion."""
    gr.Markdown("DDIM in reverse finds the noise of the picture. From that noise, DDIM draws it again.")
    label = class_control(model, "Class of the picture", index=3, optional=True)
    steps = steps_control(model, 50)

    buttons, outputs = RunButtons("Invert"), show_results("Noise", "Drawn again")

    def run(picture: EditorValue, class_name: str, steps: int) -> Iterator[tuple]:
        yield from invert(model, edited_picture(picture), class_number(model, class_name), steps)

    buttons.start(run, [editor, label, steps], outputs, api_name="invert")


def build_counterfactual(model: PageModel, editor: gr.ImageEditor) -> None:
    """Adds counterfactuals."""
    gr.Markdown("The noise of the picture is drawn as another class. The style stays, and the class changes.")
    with gr.Row():
        label = class_control(model, "Class of the picture", index=3, optional=True)
        target = class_control(model, "Class to become", index=8)
    scale, steps = scale_control(model, 2.0), steps_control(model, 50)

    buttons, outputs = RunButtons("Change the class"), show_results("Counterfactual")

    def run(
        picture: EditorValue, class_name: str, target_name: str, guidance_scale: float, steps: int
    ) -> Iterator[tuple]:
        labels = class_number(model, class_name), class_number(model, target_name)
        yield from counterfactual(model, edited_picture(picture), *labels, guidance_scale, steps)

    buttons.start(run, [editor, label, target, scale, steps], outputs, api_name="counterfactual")


def build_inpainting(model: PageModel, editor: gr.ImageEditor) -> None:
    """Adds inpainting."""
    gr.Markdown("RePaint draws a part of the picture anew, so that it fits the rest and the class.")
    region = gr.Radio([*REGIONS, PAINTED], value="Lower half", label="Part to draw anew")
    with gr.Column(visible=False) as painting:
        side = max(SHOWN_SIDE, model.size)
        brush = gr.Brush(default_size=side // 8, colors=["#d62728"], color_mode="fixed")
        mask = picture_editor("Paint the part to draw anew", Image.new("RGB", (side, side)), brush)
    label = class_control(model, "Class to draw", index=3, optional=True)
    scale = scale_control(model, 1.0)
    with gr.Row():
        steps = steps_control(model, 50, minimum=20, maximum=100)
        rounds = gr.Slider(1, 10, value=3, step=1, precision=0, label="Rounds")
    seed = seed_control()
    buttons, outputs = RunButtons("Inpaint"), show_results("Inpainted")

    def show_painting(chosen: str, value: EditorValue) -> tuple:
        picture = enlarged(model_picture(edited_picture(value), model))
        return gr.Column(visible=chosen == PAINTED), as_editor_value(picture)

    def run(
        picture: EditorValue,
        part: str,
        painted: EditorValue,
        class_name: str,
        guidance_scale: float,
        steps: int,
        rounds: int,
        seed: int,
    ) -> Iterator[tuple]:
        known = model_picture(edited_picture(picture), model)
        region = painted_region(painted) if part == PAINTED else boxed_region(part, model.size)
        label = class_number(model, class_name)
        yield from inpaint(model, known, region, label, guidance_scale, steps, rounds, seed)

    region.input(show_painting, [region, editor], [painting, mask], api_visibility="private", queue=False)
    inputs = [editor, region, mask, label, scale, steps, rounds, seed]
    buttons.start(run, inputs, outputs, api_name="inpaint")


def boxed_region(name: str, size: int) -> Image.Image:
    """Returns a mask of one of `REGIONS`, which is white in the region."""
    region = Image.new("L", (size, size))
    region.paste(255, tuple(round(fraction * size) for fraction in REGIONS[name]))
    return region


def build_super_resolution(model: PageModel, editor: gr.ImageEditor) -> None:
    """Adds super-resolution."""
    gr.Markdown("The picture is shrunk. DDNM draws a large one that agrees with the small one.")
    factors = [factor for factor in (2, 4, 8) if model.size % factor == 0] or [1]
    factor = gr.Radio(factors, value=factors[len(factors) // 2], label="Factor")
    label = class_control(model, "Class of the picture", index=3, optional=True)
    steps, seed = steps_control(model, 50), seed_control()

    buttons, outputs = RunButtons("Enlarge"), show_results("Shrunk", "Enlarged by the model")

    def run(picture: EditorValue, factor: int, class_name: str, steps: int, seed: int) -> Iterator[tuple]:
        label = class_number(model, class_name)
        yield from super_resolve(model, edited_picture(picture), factor, label, steps, seed)

    buttons.start(run, [editor, factor, label, steps, seed], outputs, api_name="super_resolve")


def show_results(*labels: str) -> list[Component]:
    """Adds pictures side by side, and a status line below them. Returns all of them."""
    with gr.Row():
        pictures = [result_picture(label) for label in labels]
    return [*pictures, status_line()]
