"""Functions that the examples share: their options, their digits and their pictures."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from diffusers_adm import ClassifierGuidedPipeline, default_model
from diffusers_adm.command_line import CommandParser
from diffusers_adm.data.grids import checked_output, labelled_grid, save_picture
from diffusers_adm.options import add_examples, add_options, at_least, build_options, in_range, option


@dataclass(frozen=True)
class ExampleOptions:
    """Options of an example."""

    output: Path = option(
        Path("example.png"), metavar="FILE", help="Picture to write, such as digits.png or digits.jpg."
    )
    steps: int = option(50, help="Number of sampling steps.", check=at_least(1))
    digits: int = option(10, help="Number of digits, at most 10.", check=in_range(1, 10))


def parse_arguments(name: str, description: str, least_steps: int = 1, **defaults: int) -> ExampleOptions:
    """
    Parses the options of an example.

    Args:
        name: Name of the example's module.
        description: Text at the top of the help.
        least_steps: Lowest number of sampling steps with which the example draws. It is above 1 if only a part of the steps is taken.
        defaults: Defaults that replace those of [`ExampleOptions`].

    Raises:
        ValueError: If the value of an option is not allowed, or the picture cannot be written.
    """
    parser = CommandParser(prog=f"python -m diffusers_adm.examples.{name}", description=description)
    add_options(parser, ExampleOptions, title="picture", **defaults)
    add_examples(parser, f"{parser.prog} --output {name}.png", f"{parser.prog} --digits 3 --steps 25")
    options = build_options(ExampleOptions, parser.parse_args())
    if options.steps < least_steps:
        raise ValueError(f"--steps {options.steps} must be at least {least_steps}.")
    checked_output(options.output)
    return options


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
    grid = labelled_grid(list(rows), [str(column) for column in range(len(pictures[0]))], pictures)
    save_picture(grid, output)
    print(f"Wrote {output}")
