"""The default model's picture, in the manner of Figure 3 of Dhariwal & Nichol 2021: what guidance does to ten digits."""

import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image

from . import ClassifierGuidedPipeline, default_model
from .grids import labelled_grid


# Each row: its name, whether the UNet is told the digit, the guidance scale.
ROWS = (
    ("unconditional", False, 0.0),
    ("unconditional, guidance 1", False, 1.0),
    ("unconditional, guidance 10", False, 10.0),
    ("conditional, guidance 1", True, 1.0),
)


def draw_demo(output: str | Path, num_inference_steps: int = 25, seed: int = 0) -> None:
    """
    Draws the ten digits in four ways, from the same noise in each column, and writes the labelled grid.

    Args:
        output: File to write; its suffix names the format.
        num_inference_steps: Steps of DDIM.
        seed: Of the first column; the others count up from it.

    Raises:
        ValueError: If the file cannot be written there, or not in that format.
    """
    output = Path(output).absolute()
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{output.name}: pictures cannot be written as {output.suffix!r}; .png and .jpg can.")
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} to write {output.name} to.")
    pipeline = ClassifierGuidedPipeline.from_pretrained(default_model())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    digits = list(range(10))
    images: dict[str, list[Image.Image]] = {}
    started = time.monotonic()
    for told in (False, True):
        rows = [(name, scale) for name, condition_unet, scale in ROWS if condition_unet == told]
        drawn = pipeline(
            class_labels=digits * len(rows),
            guidance_scale=[scale for _, scale in rows for _ in digits],
            condition_unet=told,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed + digit) for _ in rows for digit in digits],
        ).images
        images |= {name: drawn[len(digits) * row :][: len(digits)] for row, (name, _) in enumerate(rows)}
    grid = labelled_grid([name for name, *_ in ROWS], [str(d) for d in digits], [images[name] for name, *_ in ROWS])
    grid.save(output)
    print(
        f"Drew {len(ROWS) * len(digits)} digits in {num_inference_steps} DDIM steps each, in"
        f" {time.monotonic() - started:.0f} s: {output}"
    )
