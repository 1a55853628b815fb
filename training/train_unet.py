"""Trains an ADM UNet on labelled images: `accelerate launch training/train_unet.py --help`.

The hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672), moving averages of constant rate, and, with
`--label_dropout`, a null class, so that one network is both the conditional and the unconditional model.
"""

import argparse

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.losses import drop_labels
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.training.arguments import architecture, build_parser, parse, run_script
from diffusers_adm.training.data import load_images, required_class_names
from diffusers_adm.training.denoising import (
    DenoisingObjective,
    Grid,
    add_denoising_arguments,
    check_denoising_options,
    save_averages,
)
from diffusers_adm.training.loop import Trainer, start
from diffusers_adm.training.plan import print_plan
from diffusers_adm.training.publishing import check_hub, publish, write_card


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from the command line or from a list of words."""
    parser = build_parser(__doc__)
    add_denoising_arguments(parser)
    group = parser.add_argument_group("UNet")
    group.add_argument("--class_conditional", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--label_dropout", type=float, default=0.0, help="Probability of training without the label.")
    return parse(parser, argv)


def build_unet(args: argparse.Namespace, num_classes: int | None) -> ADMUNet2DModel:
    """The model that the options describe, with random weights."""
    return ADMUNet2DModel(
        out_channels=args.in_channels * (2 if args.learn_sigma else 1),
        num_class_embeds=num_classes,
        use_null_class=args.label_dropout > 0,
        upsample_type=args.resample_type,
        **architecture(args),
    )


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    check_denoising_options(args)
    if not 0 <= args.label_dropout <= 1:
        raise ValueError(f"--label_dropout {args.label_dropout} is not in [0, 1].")
    if args.label_dropout and not args.class_conditional:
        raise ValueError("--label_dropout needs a class-conditional model.")
    if args.validation_split or args.validation_fraction:
        raise ValueError(
            "A UNet is judged by what it draws: nothing is held out here. Take --train_split to train on a part."
        )
    accelerator = start(args)
    with accelerator.main_process_first():
        images, _ = load_images(args, args.class_conditional)
    names = required_class_names(images) if args.class_conditional else None
    unet = build_unet(args, len(names) if names else None)
    if args.dry_run:
        print_plan(args, accelerator, unet, len(images))
        return
    check_hub(args, accelerator)

    def conditions(batch: dict) -> dict:
        if not args.class_conditional:
            return {}
        if not args.label_dropout:
            return {"class_labels": batch["label"]}
        return {"class_labels": drop_labels(batch["label"], unet.null_class, args.label_dropout)}

    objective = DenoisingObjective(args, accelerator, conditions)
    trainer = Trainer(args, accelerator, unet, images, args.ema_decay, stateful=objective.sampler)
    grid = Grid(trainer, objective.scheduler)
    id2label = dict(enumerate(names)) if names else None
    pipeline = ClassifierGuidedPipeline(unet=unet, scheduler=objective.scheduler, id2label=id2label)

    def validate() -> None:
        save_averages(trainer, pipeline, args.output_dir)
        grid.save()

    trainer.train(objective, validate)
    if accelerator.is_main_process and trainer.finished:
        folder = args.output_dir / "pipeline"
        write_card(args, accelerator, folder, "UNet", len(images), names)
        if args.push_to_hub:
            publish(args, folder)


if __name__ == "__main__":
    run_script(main, parse_args)
