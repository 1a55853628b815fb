"""`diffusers-adm nll`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.data.options import NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.options import ModelOptions, RunOptions
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option, option_values, text_as


@dataclass(frozen=True)
class LikelihoodOptions:
    """Images and steps of the bound."""

    output: Path = option(metavar="DIR", help="Folder of the run: a new one, or that of a run to continue.")
    num_images: int | None = option(
        None, help="Number of images, beginning with the first.", unset="all", check=at_least(1)
    )
    timestep_respacing: str = option(
        "",
        help="Timesteps of the bound as a respacing string, such as 250.",
        unset="all training timesteps",
    )
    unconditional: bool = option(False, help="Give the UNet its null class instead of the labels.")
    clip_denoised: bool = option(True, help="Clip the predicted x_0 to [-1, 1].")


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `nll`."""
    parser.add_argument(
        "dataset",
        type=text_as(),
        metavar="DATASET",
        help="Images: the Hub id or folder of a dataset, a folder of images, or an .npz file with arr_0. Required.",
    )
    add_options(parser, LikelihoodOptions, title="bound")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")
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
    images, options, model, run = (
        build_options(cls, args) for cls in (ImageSetOptions, LikelihoodOptions, ModelOptions, RunOptions)
    )
    images.check(args.dataset)

    from diffusers_adm.data.image_sets import open_images
    from diffusers_adm.evaluation.likelihood import evaluate_likelihood
    from diffusers_adm.evaluation.sampling import load_pipeline
    from diffusers_adm.launch import join_processes

    pipeline = load_pipeline(**option_values(model), device=join_processes().device)
    labelled = pipeline.unet.config.num_class_embeds is not None and not options.unconditional
    evaluate_likelihood(
        pipeline,
        open_images(args.dataset, images, labelled),
        options.output,
        num_images=options.num_images,
        timestep_respacing=options.timestep_respacing,
        unconditional=options.unconditional,
        clip_denoised=options.clip_denoised,
        **option_values(run),
        model_name=model.model,
        image_settings=option_values(images.format),
    )
