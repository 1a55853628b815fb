"""Trains an ADM upsampler on labelled images: `accelerate launch training/train_upsampler.py --help`.

The UNet sees, beside the noised image, the image itself shrunk by averages and enlarged again (Dhariwal & Nichol 2021, arXiv
2105.05233, appendix A). Losses, averages and classes are those of `train_unet.py`.
"""

import argparse

import torch
import torch.nn.functional as F

from diffusers_adm import ADMUpsamplePipeline
from diffusers_adm.data.datasets import required_class_names
from diffusers_adm.training.arguments import build_parser, load_images_of, parse, resolve_steps, run_script
from diffusers_adm.training.denoising import (
    DenoisingObjective,
    Grid,
    add_denoising_arguments,
    as_grid,
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
    group = parser.add_argument_group("upsampler")
    group.add_argument(
        "--low_resolution", type=int, default=16, help="Of the small images; a divisor of --resolution."
    )
    group.add_argument(
        "--low_res_noise",
        type=float,
        default=0.0,
        help="Largest standard deviation of noise on the small images, so that the upsampler forgives flaws of drawn ones.",
    )
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    check_denoising_options(args)
    if not 0 < args.low_resolution < args.resolution or args.resolution % args.low_resolution:
        raise ValueError(
            f"--low_resolution {args.low_resolution} is not a divisor of --resolution {args.resolution}, and smaller."
        )
    if args.low_res_noise < 0:
        raise ValueError(f"--low_res_noise {args.low_res_noise} must be at least 0.")
    accelerator = start(args)
    with accelerator.main_process_first():
        images, held_out = load_images_of(args, args.class_conditional)
    resolve_steps(args, images.num_images, accelerator.num_processes)
    names = required_class_names(images) if args.class_conditional else None
    unet = build_unet(args, len(names) if names else None, low_res_conditioning=True)
    if args.dry_run:
        print_plan(args, accelerator, unet, images.num_images)
        return
    check_hub(args, accelerator)

    def conditions(batch: dict) -> dict[str, torch.Tensor]:
        low_res = shrink(batch["image"], args.low_resolution)  # (batch, channels, low_resolution, low_resolution)
        if args.low_res_noise:
            deviation = args.low_res_noise * torch.rand_like(low_res[:, :1, :1, :1])  # (batch, 1, 1, 1)
            low_res = low_res + deviation * torch.randn_like(low_res)
        return {**label_conditions(args, unet, batch), "low_res": low_res}

    objective = DenoisingObjective(args, accelerator, conditions)
    trainer = Trainer(args, accelerator, unet, images, args.ema_decay, stateful=objective.sampler)
    id2label = dict(enumerate(names)) if names else None
    pipeline = ADMUpsamplePipeline(
        unet=unet, scheduler=objective.scheduler, id2label=id2label, low_res_size=args.low_resolution
    )

    examples = (images if held_out is None else held_out).examples(args.num_validation_images)
    low_res = shrink(torch.stack([example["image"] for example in examples]), args.low_resolution)
    low_res = ((low_res + 1) / 2).clamp(0, 1)  # (examples, channels, low_resolution, low_resolution)

    def inputs(numbers: list[int]) -> dict:
        rows = [i % len(examples) for i in numbers]
        labels = {"class_labels": [examples[row]["label"] for row in rows]} if names else {}
        return {"image": low_res[rows], **labels}

    enlarged = as_grid(pipeline, F.interpolate(low_res, args.resolution, mode="nearest"))
    grid = Grid(trainer, pipeline, inputs, shown=enlarged)
    train_pipeline(trainer, objective, pipeline, grid, names, held_out)


def shrink(image: torch.Tensor, size: int) -> torch.Tensor:
    """Images, `(batch, channels, height, width)`, as squares of `size` pixels, each the mean of those it covers."""
    return F.interpolate(image, (size, size), mode="area")


if __name__ == "__main__":
    run_script(main, parse_args)
