"""`diffusers-adm sample`."""

import argparse
import shutil
from pathlib import Path

from diffusers_adm.evaluation.commands.sampling_options import add_sampling_options, given_sampling_options
from diffusers_adm.evaluation.options import ModelOptions, RunOptions
from diffusers_adm.evaluation.sample_files import FORMATS
from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.launch import join_processes
from diffusers_adm.options import add_examples, add_options, build_options, option_values


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: a new one, or of a run to continue."
    )
    parser.add_argument(
        "--num_samples", metavar="INT", type=int, default=50_000, help="Number of images. Default: 50000."
    )
    parser.add_argument(
        "--labels",
        metavar="POLICY",
        help="random, balanced, or a file: .npz with arr_1, or a text of one number or name per line. Default: random, and for"
        " an upsampler the labels of --low_res, or no labels if there are none.",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="npz", help="npz: one file; png: one folder per class. Default: npz."
    )
    parser.add_argument(
        "--remove_shards", action="store_true", help="Delete the shards after the samples have been written."
    )
    parser.add_argument(
        "--low_res", metavar="FILE", help="Samples (.npz), with their labels, that an upsampler enlarges."
    )
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(
        parser, "sampling", "Arguments of the pipeline's call. Its own defaults apply to those that are not given."
    )
    add_examples(
        parser,
        "diffusers-adm sample --output samples --num_samples 1000 --scheduler DDIM --num_inference_steps 25",
        "diffusers-adm sample --model me/my-model --output samples --labels balanced --guidance_scale 2.5",
    )


def sample(args: argparse.Namespace) -> None:
    """
    Draws samples into `--output`: `samples_NxHxWxC.npz` as the published scripts write it, or PNG files, and a grid.

    Raises:
        ValueError: If the run is impossible, or the folder belongs to a run of other settings.
    """
    state = join_processes()
    model, run = build_options(ModelOptions, args), build_options(RunOptions, args)
    pipeline = load_pipeline(**option_values(model), device=state.device, upsampler=args.low_res is not None)
    set_scheduler(pipeline, args.scheduler)
    folder = Path(args.output)
    path = draw_samples(
        pipeline,
        folder,
        num_images=args.num_samples,
        **option_values(run),
        labels=args.labels,
        call=given_sampling_options(args),
        low_res=args.low_res,
        model_name=model.model,
        format=args.format,
    )
    if state.is_main_process:
        if args.remove_shards:
            shutil.rmtree(folder / "shards")
        print(f"{args.num_samples} samples in {path}")
