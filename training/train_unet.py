"""Trains an ADM UNet on labelled images: `accelerate launch training/train_unet.py --help`.

The hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672), moving averages of constant rate, and, with
`--label_dropout`, a null class, so that one network is both the conditional and the unconditional model.
"""

import argparse

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.data.datasets import required_class_names
from diffusers_adm.training.arguments import build_parser, load_images_of, parse, resolve_steps, run_script
from diffusers_adm.training.denoising import (
    DenoisingObjective,
    Grid,
    add_denoising_arguments,
    build_unet,
    check_denoising_options,
    label_conditions,
    train_pipeline,
)
from diffusers_adm.training.loop import Trainer, start
from diffusers_adm.training.plan import print_plan
from diffusers_adm.training.publishing import check_hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from the command line or from a list of words."""
    parser = build_parser(__doc__)
    add_denoising_arguments(parser)
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    check_denoising_options(args)
    accelerator = start(args)
    with accelerator.main_process_first():
        images, held_out = load_images_of(args, args.class_conditional)
    resolve_steps(args, images.num_images, accelerator.num_processes)
    names = required_class_names(images) if args.class_conditional else None
    unet = build_unet(args, len(names) if names else None)
    if args.dry_run:
        print_plan(args, accelerator, unet, images.num_images)
        return
    check_hub(args, accelerator)

    objective = DenoisingObjective(args, accelerator, lambda batch: label_conditions(args, unet, batch))
    trainer = Trainer(args, accelerator, unet, images, args.ema_decay, stateful=objective.sampler)
    id2label = dict(enumerate(names)) if names else None
    pipeline = ClassifierGuidedPipeline(unet=unet, scheduler=objective.scheduler, id2label=id2label)

    def inputs(numbers: list[int]) -> dict:
        return {"class_labels": [i % len(names) for i in numbers]} if names else {"batch_size": len(numbers)}

    train_pipeline(trainer, objective, pipeline, Grid(trainer, pipeline, inputs), names, held_out)


if __name__ == "__main__":
    run_script(main, parse_args)
