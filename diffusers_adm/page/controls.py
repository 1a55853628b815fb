"""Controls that several tabs share."""

import gradio as gr

from diffusers_adm.page.model import PageModel


NO_CLASS = "No class"
MAX_STEPS = 250
MAX_SCALE = 20
MAX_SEED = 2**32 - 1


def class_control(model: PageModel, label: str, index: int = 0, optional: bool = False) -> gr.Dropdown:
    """
    Returns a control whose value is the name of a class. It is not shown for a model without classes.

    Args:
        model: Model whose classes are offered.
        label: Name of the control.
        index: Number of the class that is chosen at first.
        optional: Whether to offer `NO_CLASS` too, if the model can draw without a class.
    """
    names = [NO_CLASS] * (optional and model.can_forget_classes) + model.classes
    chosen = model.classes[min(index, len(model.classes) - 1)] if model.classes else NO_CLASS
    return gr.Dropdown(names or [NO_CLASS], value=chosen, label=label, visible=bool(model.classes))


def class_number(model: PageModel, name: str) -> int | None:
    """Returns the number of a class by its name in a control, or `None` for `NO_CLASS`."""
    return None if name == NO_CLASS else model.classes.index(name)


def scale_control(model: PageModel, value: float, label: str = "Guidance scale") -> gr.Slider:
    """Returns a control for the guidance scale. It is 0 and not shown for a model without a classifier."""
    shown = model.is_guided
    return gr.Slider(0, MAX_SCALE, value=value if shown else 0, step=0.1, label=label, visible=shown)


def steps_control(
    model: PageModel, value: int, maximum: int = MAX_STEPS, minimum: int = 1, label: str = "Steps"
) -> gr.Slider:
    """Returns a control for the number of steps. A consistency model has its own default and largest number."""
    if model.consistency_steps is not None:
        value, largest = model.consistency_steps
        maximum = min(maximum, largest)
    return gr.Slider(minimum, maximum, value=value, step=1, precision=0, label=label)


def seed_control(label: str = "Seed", value: int = 0) -> gr.Number:
    """Returns a control for a seed."""
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=MAX_SEED)


def scheduler_control(model: PageModel, label: str = "Solver") -> gr.Dropdown:
    """Returns a control whose value is the name of a scheduler."""
    return gr.Dropdown(model.schedulers, value=model.schedulers[0], label=label)


def told_control(model: PageModel, value: bool = True, label: str = "Tell the UNet the class") -> gr.Checkbox:
    """Returns a control for whether the UNet is told the class. It is shown for a UNet that can be run with and without a class."""
    shown = model.is_told_classes and model.can_forget_classes
    return gr.Checkbox(value or not model.can_forget_classes, label=label, visible=shown)


def result_picture(label: str) -> gr.Image:
    """Returns an output for a picture, without loss and with sharp pixels."""
    buttons = ["download", "fullscreen"]  # no button for sharing, because it would upload the picture
    return gr.Image(
        label=label, format="png", type="pil", interactive=False, buttons=buttons, elem_classes="pixelated"
    )


def status_line() -> gr.Markdown:
    """Returns an output for the status of a run, which screen readers read aloud."""
    return gr.Markdown(label="Status", elem_classes="status")
