"""The default model's picture, in the manner of Figure 3 of Dhariwal & Nichol 2021: what guidance does to ten digits."""

import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFont

from . import ClassifierGuidedPipeline, default_model


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


def labelled_grid(
    row_names: list[str], column_names: list[str], rows: list[list[Image.Image]], zoom: int = 2, gap: int = 4
) -> Image.Image:
    """
    One picture of rows of equally large pictures, with the name of each row on its left and of each column above it.

    Args:
        row_names: Of the rows.
        column_names: Of the columns.
        rows: Pictures, a list a row.
        zoom: By how much to enlarge each.
        gap: Pixels between them.
    """
    font = ImageFont.load_default(size=16)
    margin = 8
    left = margin + max(int(font.getlength(name)) for name in row_names) + margin
    top = margin + 20
    width, height = (zoom * side for side in rows[0][0].size)
    grid = Image.new("RGB", (left + len(column_names) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, name in enumerate(column_names):
        draw.text((left + column * (width + gap) + width // 2, top // 2), name, "black", font, anchor="mm")
    for row, (name, pictures) in enumerate(zip(row_names, rows)):
        y = top + row * (height + gap)
        draw.text((margin, y + height // 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + column * (width + gap), y))
    return grid
