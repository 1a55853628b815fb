"""Functions that the examples share: their options, their digits and their pictures."""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from diffusers_adm import ClassifierGuidedPipeline, default_model
from diffusers_adm.data.grids import labelled_grid


def parse_arguments(description: str, steps: int) -> argparse.Namespace:
    """Parses the options of an example: `--output`, `--steps` and `--digits`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--output", type=Path, default=Path("example.png"), help="Picture to write. Default: %(default)s."
    )
    parser.add_argument("--steps", type=int, default=steps, help="Number of sampling steps. Default: %(default)s.")
    parser.add_argument("--digits", type=int, default=10, help="Number of digits, at most 10. Default: %(default)s.")
    return parser.parse_args()


def quiet_pipeline(ddim: bool = False) -> ClassifierGuidedPipeline:
    """Loads the default model with DDPM or DDIM, without a progress bar."""
    pipeline = ClassifierGuidedPipeline.from_pretrained(default_model())
    pipeline.set_progress_bar_config(disable=True)
    if ddim:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def true_digits(count: int) -> torch.Tensor:
    """Draws the digits 0, 1, ... that an example restores from partial information, `(count, 1, 32, 32)`, in [-1, 1]."""
    return draw(quiet_pipeline(ddim=True), count, seed=100, num_inference_steps=25, guidance_scale=1.0)


def draw(pipeline: ClassifierGuidedPipeline, count: int, seed: int = 0, **call) -> torch.Tensor:
    """Draws the digits 0, 1, ..., with one seed per image."""
    generators = [torch.Generator().manual_seed(seed + digit) for digit in range(count)]
    call = {"class_labels": list(range(count)), "guidance_scale": 0.0, **call}
    return pipeline(generator=generators, output_type="latent", **call).images.clamp(-1, 1)


def save_rows(pipeline: ClassifierGuidedPipeline, rows: dict[str, torch.Tensor], output: Path) -> None:
    """Writes a picture of named rows of images in [-1, 1]."""
    pictures = [pipeline.image_processor.postprocess(row) for row in rows.values()]
    labelled_grid(list(rows), [str(column) for column in range(len(pictures[0]))], pictures).save(output)
    print(f"Wrote {output}")
