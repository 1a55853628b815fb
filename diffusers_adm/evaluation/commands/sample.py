"""`diffusers-adm sample`."""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.evaluation.commands.sampling_options import add_sampling_options, given_sampling_options
from diffusers_adm.evaluation.options import FORMATS, MAX_IMAGES, ModelOptions, RunOptions
from diffusers_adm.options import add_examples, add_options, build_options, in_range, option, option_values


@dataclass(frozen=True)
class SampleOptions:
    """Samples to draw."""

    output: Path = option(metavar="DIR", help="Folder of the run: a new one, or that of a run to continue.")
    num_samples: int = option(50_000, help="Number of images.", check=in_range(1, MAX_IMAGES))
    labels: str | None = option(
        None,
        metavar="POLICY",
        help="Labels of the samples: random, balanced, or a file. A file is an .npz file with arr_1, or a text file with one class"
        " number or name per line.",
        unset="random for a base model, and the labels of --low_res, if any, for an upsampler",
    )
    format: str = option(
        "npz", choices=FORMATS, help="Format of the samples. npz: one file. png: one folder of images per class."
    )
    remove_shards: bool = option(False, help="Delete the shards after the samples have been written.")
    low_res: Path | None = option(
        None, metavar="FILE", help="Small samples (.npz), with their labels, that an upsampler enlarges."
    )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    add_options(parser, SampleOptions, title="samples")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(parser, "sampling", "Arguments of the pipeline's call.")
    add_examples(
        parser,
        "diffusers-adm sample --output samples --num_samples 1000 --scheduler DDIM --num_inference_steps 25",
        "diffusers-adm sample --model me/my-model --output samples --labels balanced --guidance_scale 2.5",
    )


def sample(args: argparse.Namespace) -> None:
    """
    Draws samples into `--output`: `samples_NxHxWxC.npz` as in the original code, or PNG files. A grid is also drawn.

    Raises:
        ValueError: If the run is impossible, or the folder belongs to a run of other settings.
    """
    options, model, run = (build_options(cls, args) for cls in (SampleOptions, ModelOptions, RunOptions))

    from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
    from diffusers_adm.evaluation.schedulers import set_scheduler
    from diffusers_adm.launch import join_processes

    state = join_processes()
    pipeline = load_pipeline(**option_values(model), device=state.device, upsampler=options.low_res is not None)
    set_scheduler(pipeline, args.scheduler)
    path = draw_samples(
        pipeline,
        options.output,
        num_images=options.num_samples,
        **option_values(run),
        labels=options.labels,
        call=given_sampling_options(args),
        low_res=options.low_res,
        model_name=model.model,
        format=options.format,
    )
    if state.is_main_process:
        if options.remove_shards:
            shutil.rmtree(options.output / "shards")
        print(f"{options.num_samples} samples in {path}")
