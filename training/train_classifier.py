"""Trains the noise-aware classifier that guides sampling: `accelerate launch training/train_classifier.py --help`.

Cross-entropy on noised images at uniformly drawn timesteps, AdamW with weight decay, learning rate annealed linearly
(Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.3 and Table 12).
"""

import argparse

import torch
from torch.utils.data import DataLoader

from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.data.datasets import required_class_names
from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.hub.bundle import save_model
from diffusers_adm.losses import classifier_loss
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.models.noisy_classifier import POOLS
from diffusers_adm.training.arguments import (
    architecture,
    build_noise_scheduler,
    build_parser,
    load_images_of,
    parse,
    resolve_steps,
    run_script,
)
from diffusers_adm.training.calibration import expected_calibration_error
from diffusers_adm.training.loop import Trainer, start
from diffusers_adm.training.metrics import NUM_QUARTERS, quarter_of
from diffusers_adm.training.plan import print_plan
from diffusers_adm.training.publishing import check_hub, publish, write_card


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, from the command line or from a list of words."""
    parser = build_parser(__doc__)
    parser.set_defaults(crop="random", learning_rate=3e-4, lr_scheduler="linear", adam_weight_decay=0.05)
    group = parser.add_argument_group("classifier")
    group.add_argument("--pool", choices=POOLS, default="attention")
    group.add_argument(
        "--entropy_weight", type=float, default=0.0, help="Of the penalty on confidence; 0.1 in its paper."
    )
    return parse(parser, argv)


def main(args: argparse.Namespace) -> None:
    """
    Trains, and saves the classifier.

    Raises:
        ValueError: If the options do not fit each other or the dataset.
    """
    accelerator = start(args)
    with accelerator.main_process_first():
        images, held_out = load_images_of(args)
    resolve_steps(args, images.num_images, accelerator.num_processes)
    names = required_class_names(images)
    classifier = NoisyClassifier(num_classes=len(names), pool=args.pool, **architecture(args))
    if args.dry_run:
        print_plan(args, accelerator, classifier, images.num_images)
        return
    check_hub(args, accelerator)
    trainer = Trainer(args, accelerator, classifier, images)
    schedule = NoiseSchedule.from_config(build_noise_scheduler(args).config).to(accelerator.device)

    def noised_logits(
        model: torch.nn.Module, x_0: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = x_0.device
        timestep = torch.randint(len(schedule), x_0.shape[:1], generator=generator, device=device)  # (batch,)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        x_t = add_noise(schedule, x_0, timestep, noise)  # (batch, channels, resolution, resolution)
        logits = model(x_t, timestep).logits.float()  # (batch, num_classes)
        return logits, quarter_of(timestep, len(schedule))

    def losses(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        logits, quarter = noised_logits(model, batch["image"])
        loss = classifier_loss(logits, batch["label"], args.entropy_weight)
        return {"loss": loss, **right_answers(logits, batch["label"]), "quarter": quarter}

    validate = None
    if held_out is not None:
        loader = DataLoader(held_out, batch_size=args.train_batch_size, generator=torch.Generator())
        loader = accelerator.prepare(loader)

        @torch.no_grad()
        def validate() -> None:
            """Accuracy and calibration on the held-out images, by quarter of the timesteps, least noise first."""
            # The same timesteps and noise each time, and none from the stream that training draws from.
            generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
            gathered = []
            for batch in loader:
                logits, quarter = noised_logits(trainer.model, batch["image"], generator)
                answers = right_answers(logits, batch["label"])
                columns = [quarter, logits.softmax(dim=1).amax(dim=1), *answers.values()]
                gathered.append(accelerator.gather_for_metrics(torch.stack([c.float() for c in columns], dim=1)))
                if trainer.stop.agreed():
                    return
            quarter, confidence, *answers = torch.cat(gathered).unbind(dim=1)
            values = {}
            for q in range(NUM_QUARTERS):
                inside = quarter == q
                if inside.any():
                    for name, answer in zip(("accuracy", "accuracy_top5"), answers):
                        values[f"validation_{name}_quarter_{q}"] = answer[inside].mean().item()
                    error = expected_calibration_error(confidence[inside], answers[0][inside])
                    values[f"validation_calibration_error_quarter_{q}"] = error
            trainer.log(values)

    trainer.train(losses, validate)
    if accelerator.is_main_process and trainer.finished:
        folder = args.output_dir / "classifier"
        with atomic_folder(folder) as partial:
            save_model(classifier, partial)
        write_card(args, accelerator, folder, type(classifier).__name__, images.num_images, names, trainer.global_step)
        if args.push_to_hub:
            publish(args, folder)


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whether the label is the likeliest class, and whether it is among the five likeliest: `(batch,)` each."""
    likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (batch, 5)
    return {"accuracy": likeliest[:, 0].float(), "accuracy_top5": likeliest.any(dim=1).float()}


if __name__ == "__main__":
    run_script(main, parse_args)
