"""What a network that removes noise is trained by, and pictures of how far it has come."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.diffusion import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_adm.losses import hybrid_loss, vlb_loss
from diffusers_adm.timestep_sampling import SAMPLERS
from diffusers_adm.training.arguments import build_noise_scheduler, numbers
from diffusers_adm.training.checkpoints import save_whole
from diffusers_adm.training.loop import Trainer
from diffusers_adm.training.metrics import quarter_of


LOSSES = ("hybrid", "vlb")


def add_denoising_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the objective, the averages and the pictures."""
    group = parser.add_argument_group("objective")
    group.add_argument("--learn_sigma", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon", help="sample: predict x_0.")
    group.add_argument(
        "--loss", choices=LOSSES, default="hybrid", help="hybrid (simple without learned variance), vlb."
    )
    group.add_argument(
        "--vlb_weight", type=float, default=None, help="Of the hybrid loss's bound; default: timesteps / 1000."
    )
    group.add_argument(
        "--noise_offset",
        type=float,
        default=0.0,
        help="Standard deviation of noise that is the same at all pixels of a channel: keeps few-step samples from grey"
        " backgrounds.",
    )
    group.add_argument("--schedule_sampler", choices=tuple(SAMPLERS), default="uniform")
    group.add_argument("--ema_decay", type=numbers(float), default=(0.9999,), help="Several: 0.9999,0.999.")
    group.add_argument("--offload_ema", action="store_true", help="Keep the averages in the CPU's memory.")
    group.add_argument("--num_validation_images", type=int, default=20, help="Drawn every --validation_steps.")


def check_denoising_options(args: argparse.Namespace) -> None:
    """Raises a ValueError if options are out of their range."""
    if args.num_validation_images < 1:
        raise ValueError(f"--num_validation_images {args.num_validation_images} must be at least 1.")
    if args.noise_offset < 0:
        raise ValueError(f"--noise_offset {args.noise_offset} must be at least 0.")
    if not args.ema_decay or not all(0 <= decay < 1 for decay in args.ema_decay):
        raise ValueError(f"--ema_decay {args.ema_decay} must be one or more rates in [0, 1).")


class DenoisingObjective:
    """
    Noises images at random timesteps and judges what a network makes of them.

    Args:
        args: Parsed `add_denoising_arguments`.
        accelerator: Of the script.
        conditions: From a batch to the network's arguments beside the noised images and their timesteps.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, conditions: Callable[[dict], dict]):
        self.args = args
        self.accelerator = accelerator
        self.conditions = conditions
        self.scheduler = build_noise_scheduler(args, args.learn_sigma, args.prediction_type == "sample")
        self.schedule = NoiseSchedule.from_config(self.scheduler.config).to(accelerator.device)
        self.sampler = SAMPLERS[args.schedule_sampler](len(self.schedule)).to(accelerator.device)

    def __call__(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """The terms of the loss, `(batch,)` each."""
        args, schedule = self.args, self.schedule
        x_0 = batch["image"]  # (batch, channels, resolution, resolution)
        timestep, weight = self.sampler.sample(len(x_0), x_0.device)  # (batch,) each
        noise = torch.randn_like(x_0)
        if args.noise_offset:
            noise = noise + args.noise_offset * torch.randn_like(x_0[..., :1, :1])
        x_t = add_noise(schedule, x_0, timestep, noise)
        model_output = model(x_t, timestep, **self.conditions(batch)).sample  # (batch, (2 *) channels, ...)
        if args.loss == "vlb":
            total = vlb_loss(model_output, schedule, x_0, x_t, timestep, args.prediction_type)
            terms = {"vlb": total}
        else:
            loss = hybrid_loss(
                model_output, schedule, x_0, x_t, timestep, noise, args.prediction_type, args.vlb_weight
            )
            total = loss.total
            terms = {"simple": loss.simple} if loss.vlb is None else {"simple": loss.simple, "vlb": loss.vlb}
        if self.sampler.needs_losses:
            self.sampler.update(*self.accelerator.gather((timestep, total.detach())))
        return {"loss": total * weight, **terms, "quarter": quarter_of(timestep, len(schedule))}


class Grid:
    """
    Draws the same seeds and labels again and again: with the average on the left, with the raw weights on the right.

    Args:
        trainer: Whose model draws.
        scheduler: What the model is trained with.
    """

    def __init__(self, trainer: Trainer, scheduler: DDPMScheduler):
        self.trainer = trainer
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.scheduler = DDIMScheduler.from_config(scheduler.config)

    def save(self) -> None:
        """Writes `samples/step-N.png`; all processes draw, each its share."""
        decay = self.args.ema_decay[0]
        with self.trainer.averaged_weights(decay):
            averaged = self.draw()
        raw = self.draw()
        if self.trainer.stop.agreed() or not self.accelerator.is_main_process:
            return
        picture = Image.new(averaged.mode, (2 * averaged.width + self.args.resolution // 2, averaged.height), "grey")
        picture.paste(averaged)
        picture.paste(raw, (picture.width - raw.width, 0))
        path = self.args.output_dir / "samples" / f"step-{self.trainer.global_step}.png"
        with self.trainer.surviving(path.name):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)

    def draw(self) -> Image.Image:
        """A grid of `--num_validation_images` images, each from its own seed, the classes in turn."""
        unet, count = self.trainer.unwrapped_model, self.args.num_validation_images
        pipeline = ClassifierGuidedPipeline(unet=unet, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        # All draw equally many, and what is beyond the count is dropped.
        share = -(-count // self.accelerator.num_processes)
        seeds = [self.accelerator.process_index * share + i for i in range(share)]
        num_classes = unet.config.num_class_embeds
        drawn = []
        for batch in torch.tensor(seeds).split(self.args.train_batch_size):  # more may not fit beside the training
            batch = batch.tolist()
            drawn.append(
                pipeline(
                    class_labels=[seed % num_classes for seed in batch] if num_classes else None,
                    batch_size=1 if num_classes else len(batch),
                    num_inference_steps=min(50, self.args.num_train_timesteps),
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    output_type="pt",
                    callback_on_step_end=self._stop_drawing,
                ).images
            )
        images = self.accelerator.gather(torch.cat(drawn))[:count]  # (count, channels, height, width) in [0, 1]
        drawn = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(images))
        columns = min(count, 10)
        rows = -(-count // columns)
        drawn += [Image.new(drawn[0].mode, drawn[0].size)] * (rows * columns - count)
        return make_image_grid(drawn, rows, columns)

    def _stop_drawing(self, pipeline: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        pipeline._interrupt = self.trainer.stop.received
        return tensors


def save_averages(trainer: Trainer, pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves the pipeline with each moving average: the first as `pipeline`, the others with their rate in the name."""
    for decay in trainer.args.ema_decay:
        name = "pipeline" if decay == trainer.args.ema_decay[0] else f"pipeline-ema-{decay:g}"
        if trainer.accelerator.is_main_process:
            with trainer.averaged_weights(decay), trainer.surviving(name):
                save_whole(pipeline, folder / name)
