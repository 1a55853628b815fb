"""Trains an ADM UNet on labelled images: `accelerate launch training/train_unet.py --help`.

The hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672), a moving average of constant rate, and, with
`--label_dropout`, a null class, so that one network is both the conditional and the unconditional model.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.diffusion import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_adm.losses import drop_labels, hybrid_loss
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.training.data import load_images
from diffusers_adm.training.loop import (
    Trainer,
    add_training_arguments,
    architecture,
    build_noise_scheduler,
    save_whole,
    start,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from the command line or from a list of words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_training_arguments(parser)
    group = parser.add_argument_group("UNet")
    group.add_argument("--class_conditional", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--label_dropout", type=float, default=0.0, help="Probability of training without the label.")
    group.add_argument("--learn_sigma", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="sample: predict x_0.")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group.add_argument("--num_validation_images", type=int, default=20, help="Drawn every --validation_steps.")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    accelerator = start(args)
    images = load_images(args, args.train_split, augment=True)
    if args.class_conditional and images.class_names is None:
        raise ValueError("The dataset has no labels: name them by --label_column, or pass --no-class_conditional.")
    if not 0 <= args.label_dropout <= 1:
        raise ValueError(f"--label_dropout {args.label_dropout} is not in [0, 1].")
    if args.label_dropout and not args.class_conditional:
        raise ValueError("--label_dropout needs a class-conditional model.")
    if args.num_validation_images < 1:
        raise ValueError(f"--num_validation_images {args.num_validation_images} must be at least 1.")
    noise_scheduler = build_noise_scheduler(args, args.learn_sigma, args.prediction_type == "sample")
    unet = ADMUNet2DModel(
        out_channels=args.in_channels * (2 if args.learn_sigma else 1),
        num_class_embeds=len(images.class_names) if args.class_conditional else None,
        use_null_class=args.label_dropout > 0,
        **architecture(args),
    )
    trainer = Trainer(args, accelerator, unet, images.dataset, args.ema_decay)
    schedule = NoiseSchedule.from_config(noise_scheduler.config).to(accelerator.device)

    def losses(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        x_0 = batch["image"]  # (batch, channels, resolution, resolution)
        timestep = torch.randint(len(schedule), x_0.shape[:1], device=x_0.device)  # (batch,)
        noise = torch.randn_like(x_0)
        x_t = add_noise(schedule, x_0, timestep, noise)
        labels = batch["label"] if args.class_conditional else None
        if args.label_dropout:
            labels = drop_labels(labels, unet.null_class, args.label_dropout)
        model_output = model(x_t, timestep, labels).sample  # (batch, channels or 2 * channels, resolution, resolution)
        loss = hybrid_loss(model_output, schedule, x_0, x_t, timestep, noise, args.prediction_type)
        terms = {"loss": loss.total, "simple": loss.simple}
        return terms if loss.vlb is None else {**terms, "vlb": loss.vlb}

    def validate() -> None:
        """Draws the same seeds with the average and with the raw weights, and saves the averaged pipeline."""
        if not accelerator.is_main_process:
            return
        samples = args.output_dir / "samples"
        pipeline = ClassifierGuidedPipeline(
            unet=unet,
            scheduler=noise_scheduler,
            id2label=dict(enumerate(images.class_names)) if images.class_names else None,
        )
        with trainer.averaged_weights():
            save_whole(pipeline, args.output_dir / "pipeline")
            save_grid(pipeline, args, samples / f"step-{trainer.global_step}-ema.png")
        save_grid(pipeline, args, samples / f"step-{trainer.global_step}-raw.png")

    trainer.train(losses, validate)


def save_grid(pipeline: ClassifierGuidedPipeline, args: argparse.Namespace, path: Path) -> None:
    """Draws `--num_validation_images` images, each from its own seed, the classes in turn."""
    sampler = ClassifierGuidedPipeline(
        unet=pipeline.unet, scheduler=DDIMScheduler.from_config(pipeline.scheduler.config)
    )
    sampler.set_progress_bar_config(disable=True)
    count, num_classes = args.num_validation_images, pipeline.unet.config.num_class_embeds
    drawn = sampler(
        class_labels=[i % num_classes for i in range(count)] if num_classes else None,
        batch_size=1 if num_classes else count,
        num_inference_steps=min(50, args.num_train_timesteps),
        generator=[torch.Generator().manual_seed(i) for i in range(count)],
    ).images
    columns = min(count, 10)
    rows = -(-count // columns)
    drawn += [Image.new(drawn[0].mode, drawn[0].size)] * (rows * columns - count)
    path.parent.mkdir(exist_ok=True)
    make_image_grid(drawn, rows, columns).save(path)


if __name__ == "__main__":
    main(parse_args())
