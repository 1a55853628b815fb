"""`diffusers-adm nll`."""

import argparse
from pathlib import Path

from diffusers_adm.data.image_sets import NO_DATASET, ImageSetOptions, open_images
from diffusers_adm.evaluation.likelihood import evaluate_likelihood
from diffusers_adm.evaluation.options import ModelOptions, RunOptions
from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.launch import join_processes
from diffusers_adm.options import add_examples, add_options, build_options, option_values


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `nll`."""
    parser.add_argument("dataset", help="Hub id, folder of images, dataset's folder, or .npz with arr_0.")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: a new one, or of a run to continue."
    )
    parser.add_argument(
        "--num_images", metavar="INT", type=int, help="Number of images, the first ones. All by default."
    )
    parser.add_argument(
        "--timestep_respacing",
        metavar="TEXT",
        default="",
        help="Steps of the process as a published string. All by default.",
    )
    parser.add_argument("--unconditional", action="store_true", help="Give the UNet its null class for all images.")
    parser.add_argument(
        "--clip_denoised",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Clip the predicted x_0 to [-1, 1]. On by default.",
    )
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm nll my_images --resolution 64 --model me/my-model --output likelihood",
        "diffusers-adm nll images.npz --model me/my-model --timestep_respacing 250 --num_images 1000 --output likelihood",
    )


def nll(args: argparse.Namespace) -> None:
    """
    Computes a model's variational bound on a dataset, on all processes of a launch.

    Raises:
        ValueError: If model and images do not fit together, or the folder belongs to a run of other settings.
    """
    options, model = build_options(ImageSetOptions, args), build_options(ModelOptions, args)
    options.check(args.dataset)
    pipeline = load_pipeline(**option_values(model), device=join_processes().device)
    labelled = pipeline.unet.config.num_class_embeds is not None and not args.unconditional
    evaluate_likelihood(
        pipeline,
        open_images(args.dataset, options, labelled),
        Path(args.output),
        num_images=args.num_images,
        timestep_respacing=args.timestep_respacing,
        unconditional=args.unconditional,
        clip_denoised=args.clip_denoised,
        **option_values(build_options(RunOptions, args)),
        model_name=model.model,
        image_settings=option_values(options.format),
    )
