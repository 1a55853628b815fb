"""Trains the noise-aware classifier that guides sampling: `accelerate launch training/train_classifier.py --help`.

Cross-entropy on noised images at uniformly drawn timesteps, AdamW with weight decay, learning rate annealed linearly
(Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.3 and Table 12).
"""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.models.noisy_classifier import POOLS
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
    parser.set_defaults(crop="random", learning_rate=3e-4, lr_scheduler="linear", adam_weight_decay=0.05)
    group = parser.add_argument_group("classifier")
    group.add_argument("--validation_split", default=None, help="Split of the dataset to measure accuracy on.")
    group.add_argument("--pool", choices=POOLS, default="attention")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the classifier.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    accelerator = start(args)
    images = load_images(args, args.train_split, augment=True)
    if images.class_names is None:
        raise ValueError("The dataset has no labels: name them by --label_column.")
    classifier = NoisyClassifier(
        num_classes=len(images.class_names),
        pool=args.pool,
        **architecture(args),
    )
    trainer = Trainer(args, accelerator, classifier, images.dataset)
    schedule = NoiseSchedule.from_config(build_noise_scheduler(args).config).to(accelerator.device)

    def noised_logits(
        model: torch.nn.Module, x_0: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = x_0.device
        timestep = torch.randint(len(schedule), x_0.shape[:1], generator=generator, device=device)  # (batch,)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        x_t = add_noise(schedule, x_0, timestep, noise)  # (batch, channels, resolution, resolution)
        return model(x_t, timestep).logits.float(), timestep  # (batch, num_classes), (batch,)

    def losses(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        logits, _ = noised_logits(model, batch["image"])
        correct = logits.argmax(dim=1) == batch["label"]
        return {"loss": F.cross_entropy(logits, batch["label"], reduction="none"), "accuracy": correct.float()}

    validate = None
    if args.validation_split:
        held_out = load_images(args, args.validation_split, augment=False).dataset
        loader = DataLoader(held_out, batch_size=args.train_batch_size, generator=torch.Generator())
        loader = accelerator.prepare(loader)

        @torch.no_grad()
        def validate() -> None:
            """Accuracy on the held-out split by quarter of the timesteps, least noise first."""
            # The same timesteps and noise each time, and none from the stream that training draws from.
            generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
            quarters, hits = [], []
            for batch in loader:
                logits, timestep = noised_logits(trainer.model, batch["image"], generator)
                hit = logits.argmax(dim=1) == batch["label"]
                timestep, hit = accelerator.gather_for_metrics((timestep, hit))
                quarters.append(4 * timestep // len(schedule))
                hits.append(hit)
            quarters, hits = torch.cat(quarters), torch.cat(hits).float()
            trainer.log(
                {
                    f"validation_accuracy_quarter_{q}": hits[quarters == q].mean().item()
                    for q in range(4)
                    if (quarters == q).any()
                }
            )

    trainer.train(losses, validate)
    if accelerator.is_main_process:
        save_whole(classifier, args.output_dir / "classifier")


if __name__ == "__main__":
    main(parse_args())
