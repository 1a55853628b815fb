"""Pictures of the models that ship with this package.

The pictures of digits and of photographs show the effect of guidance on ten classes, as Figure 3 of Dhariwal & Nichol 2021 does. The
picture of the default cascade shows the images of each stage.
"""

import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from diffusers_adm import (
    ADMUpsamplePipeline,
    ClassifierGuidedPipeline,
    default_cascade,
    default_model,
    default_photo_model,
)
from diffusers_adm.data.grids import checked_output, labelled_grid, save_picture


# Rows: name, whether the UNet is given the class, guidance scale.
ROWS = (
    ("unconditional", False, 0.0),
    ("unconditional, guidance 1", False, 1.0),
    ("unconditional, guidance 10", False, 10.0),
    ("conditional, guidance 1", True, 1.0),
)


def draw_demo(output: str | Path, num_inference_steps: int = 25, seed: int = 0, photos: bool = False) -> None:
    """
    Draws ten classes with four settings, and writes a labelled grid. All images of a column begin with the same noise.

    Args:
        output: File to write. Its suffix decides the format.
        num_inference_steps: Number of DDIM steps.
        seed: Seed of the first column. Each further column has the next seed.
        photos: Whether to draw small photographs instead of digits.

    Raises:
        ValueError: If the folder does not exist, or the format is not supported.
    """
    output = checked_output(output)
    pipeline = load_with_ddim(ClassifierGuidedPipeline, default_photo_model() if photos else default_model())
    names = list(pipeline.config.id2label.values())
    classes = list(range(len(names)))
    images: dict[str, list[Image.Image]] = {}
    started = time.monotonic()
    for condition_unet in (False, True):
        rows = [(name, scale) for name, conditioned, scale in ROWS if conditioned == condition_unet]
        drawn = pipeline(
            class_labels=classes * len(rows),
            guidance_scale=[scale for _, scale in rows for _ in classes],
            condition_unet=condition_unet,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed + number) for _ in rows for number in classes],
        ).images
        images |= {name: drawn[len(classes) * row :][: len(classes)] for row, (name, _) in enumerate(rows)}
    grid = labelled_grid(
        [name for name, *_ in ROWS], names, [images[name] for name, *_ in ROWS], zoom=3 if photos else 2
    )
    save_picture(grid, output)
    print(
        f"Drew {len(ROWS) * len(classes)} {'photographs' if photos else 'digits'} in {num_inference_steps} DDIM steps each, in"
        f" {time.monotonic() - started:.0f} s: {output}"
    )


def draw_cascade_demo(output: str | Path, num_inference_steps: int = 25, seed: int = 0) -> None:
    """
    Draws the ten digits at 16x16 pixels, enlarges them to 32x32, and writes a labelled grid.

    Args:
        output: File to write. Its suffix decides the format.
        num_inference_steps: Number of DDIM steps per stage.
        seed: Seed of the first column. Each further column has the next seed.

    Raises:
        ValueError: If the folder does not exist, or the format is not supported.
    """
    output = checked_output(output)
    base, upsampler = default_cascade()
    base = load_with_ddim(ClassifierGuidedPipeline, base)
    upsampler = load_with_ddim(ADMUpsamplePipeline, upsampler)
    digits = list(range(10))
    options = {
        "class_labels": digits,
        "num_inference_steps": num_inference_steps,
        "generator": [torch.Generator().manual_seed(seed + digit) for digit in digits],
    }
    started = time.monotonic()
    small = base(**options).images
    large = upsampler(small, **options).images
    elapsed = time.monotonic() - started
    rows = {"drawn, 16x16": [image.resize(large[0].size, Image.Resampling.NEAREST) for image in small]}
    rows["enlarged to 32x32"] = large
    save_picture(labelled_grid(list(rows), [str(d) for d in digits], list(rows.values())), output)
    print(f"Drew {len(digits)} digits in two stages of {num_inference_steps} DDIM steps, in {elapsed:.0f} s: {output}")


def load_with_ddim(pipeline_class: type[DiffusionPipeline], folder: str) -> DiffusionPipeline:
    """Loads a pipeline and replaces its scheduler by DDIM, which needs few steps."""
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline
