"""What a network that removes noise is trained by, and pictures of how far it has come."""

import argparse
import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.grids import grid_of
from diffusers_adm.diffusion import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_adm.losses import drop_labels, hybrid_loss, vlb_loss
from diffusers_adm.training.arguments import architecture, build_noise_scheduler, numbers
from diffusers_adm.training.loop import Trainer
from diffusers_adm.training.metrics import Means, quarter_of
from diffusers_adm.training.publishing import BackgroundPush, publish, write_card
from diffusers_adm.training.timestep_sampling import SAMPLERS


LOSSES = ("hybrid", "vlb")


def add_denoising_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the classes, the objective, the averages and the pictures."""
    group = parser.add_argument_group("classes")
    group.add_argument("--class_conditional", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--label_dropout", type=float, default=0.0, help="Probability of training without the label.")

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
    group.add_argument(
        "--use_ema_warmup",
        action="store_true",
        help="Raise the rate to --ema_decay, by 1 - (1 + step / gamma) ** -power.",
    )
    group.add_argument("--ema_inv_gamma", type=float, default=1.0, help="The gamma of the warm-up.")
    group.add_argument("--ema_power", type=float, default=0.75, help="The power of the warm-up.")
    group.add_argument("--offload_ema", action="store_true", help="Keep the averages in the CPU's memory.")
    group.add_argument("--num_validation_images", type=int, default=20, help="Drawn every --validation_steps.")
    group.add_argument(
        "--push_every",
        type=int,
        default=None,
        help="Upload the pipeline so far every so many steps, a multiple of --validation_steps, while training goes on.",
    )


def check_denoising_options(args: argparse.Namespace) -> None:
    """Raises a ValueError if options are out of their range."""
    if args.num_validation_images < 1:
        raise ValueError(f"--num_validation_images {args.num_validation_images} must be at least 1.")
    if args.push_every is not None:
        if not args.push_to_hub:
            raise ValueError("--push_every needs --push_to_hub.")
        if args.push_every < 1 or args.push_every % args.validation_steps:
            raise ValueError(
                f"--push_every {args.push_every} is not a multiple of --validation_steps {args.validation_steps}, when"
                " pipelines are saved."
            )
    if args.noise_offset < 0:
        raise ValueError(f"--noise_offset {args.noise_offset} must be at least 0.")
    if not args.ema_decay or not all(0 <= decay < 1 for decay in args.ema_decay):
        raise ValueError(f"--ema_decay {args.ema_decay} must be one or more rates in [0, 1).")
    if not 0 <= args.label_dropout <= 1:
        raise ValueError(f"--label_dropout {args.label_dropout} is not in [0, 1].")
    if args.label_dropout and not args.class_conditional:
        raise ValueError("--label_dropout needs a class-conditional model.")


def build_unet(
    args: argparse.Namespace, num_classes: int | None, low_res_conditioning: bool = False
) -> ADMUNet2DModel:
    """The model that the options describe, with random weights."""
    return ADMUNet2DModel(
        out_channels=args.in_channels * (2 if args.learn_sigma else 1),
        num_class_embeds=num_classes,
        use_null_class=args.label_dropout > 0,
        low_res_conditioning=low_res_conditioning,
        upsample_type=args.resample_type,
        **architecture(args),
    )


def label_conditions(args: argparse.Namespace, unet: ADMUNet2DModel, batch: dict) -> dict[str, torch.Tensor]:
    """The labels of a batch as the network's argument, some of them dropped."""
    if not args.class_conditional:
        return {}
    if not args.label_dropout:
        return {"class_labels": batch["label"]}
    return {"class_labels": drop_labels(batch["label"], unet.null_class, args.label_dropout)}


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
        """The terms of the loss at timesteps that the sampler draws, `(batch,)` each."""
        timestep, weight = self.sampler.sample(len(batch["image"]), batch["image"].device)  # (batch,) each
        terms = self.terms(model, batch, timestep)
        if self.sampler.needs_losses:
            self.sampler.update(*self.accelerator.gather((timestep, terms["loss"].detach())))
        return {**terms, "loss": terms["loss"] * weight}

    def terms(self, model: torch.nn.Module, batch: dict, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms of the loss, and the quarter that each timestep is in: `(batch,)` each."""
        args, schedule = self.args, self.schedule
        x_0 = batch["image"]  # (batch, channels, resolution, resolution)
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
        return {"loss": total, **terms, "quarter": quarter_of(timestep, len(schedule))}

    @torch.no_grad()
    def measure(self, trainer: Trainer, loader: DataLoader) -> None:
        """
        Logs the losses of the averaged weights on held-out images, at timesteps and with noise that are the same each time.

        Args:
            trainer: Of the model.
            loader: Of the images; `accelerator` has prepared it.
        """
        means, device = Means(), self.accelerator.device
        seed = self.args.seed + self.accelerator.process_index
        with trainer.averaged_weights(self.args.ema_decay[0]), own_random_state(seed, device):
            for batch in loader:
                timestep = torch.randint(len(self.schedule), batch["image"].shape[:1], device=device)  # (batch,)
                terms = self.accelerator.gather_for_metrics(self.terms(trainer.model, batch, timestep))
                means.add([name for name in terms if name != "quarter"], Means.of_batch(terms))
                if trainer.stop.agreed():
                    return
        trainer.log({f"validation_{name}": value for name, value in means.take(self.accelerator).items()})


@contextlib.contextmanager
def own_random_state(seed: int, device: torch.device):
    """A random state for as long as the context lasts; that from before, of the CPU and of the device, then goes on."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    state = None if module is None else module.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        if module is not None:
            module.set_rng_state(state)


class Grid:
    """
    Draws the same seeds and labels again and again: with the average on the left, with the raw weights on the right.

    Args:
        trainer: Whose model draws.
        pipeline: That holds the model; DDIM takes the place of its scheduler.
        inputs: From the numbers of some images, from 0, to the pipeline's arguments for them.
        shown: A picture to put on the left of both.
    """

    def __init__(
        self,
        trainer: Trainer,
        pipeline: DiffusionPipeline,
        inputs: Callable[[list[int]], dict],
        shown: Image.Image | None = None,
    ):
        self.trainer = trainer
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.pipeline = copy.copy(pipeline)  # what is saved keeps its scheduler
        self.pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.inputs = inputs
        self.shown = shown

    def save(self) -> None:
        """Writes `samples/step-N.png`; all processes draw, each its share."""
        decay = self.args.ema_decay[0]
        with self.trainer.averaged_weights(decay):
            averaged = self.draw()
        raw = self.draw()
        if self.trainer.stop.agreed() or not self.accelerator.is_main_process:
            return
        panels = [averaged, raw] if self.shown is None else [self.shown, averaged, raw]
        margin = self.args.resolution // 2
        width = len(panels) * (averaged.width + margin) - margin
        picture = Image.new(averaged.mode, (width, averaged.height), "grey")
        for number, panel in enumerate(panels):
            picture.paste(panel, (number * (averaged.width + margin), 0))
        path = self.args.output_dir / "samples" / f"step-{self.trainer.global_step}.png"
        with self.trainer.surviving(path.name):
            path.parent.mkdir(exist_ok=True)
            picture.save(path)

    def draw(self) -> Image.Image:
        """`--num_validation_images` images, each from its own seed."""
        count = self.args.num_validation_images
        # All draw equally many, and what is beyond the count is dropped.
        share = -(-count // self.accelerator.num_processes)
        numbers = [self.accelerator.process_index * share + i for i in range(share)]
        drawn = []
        for batch in torch.tensor(numbers).split(self.args.train_batch_size):  # more may not fit beside the training
            batch = batch.tolist()
            drawn.append(
                self.pipeline(
                    **self.inputs(batch),
                    num_inference_steps=min(50, self.args.num_train_timesteps),
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    output_type="pt",
                    callback_on_step_end=self._stop_drawing,
                ).images
            )
        images = self.accelerator.gather(torch.cat(drawn))[:count]  # (count, channels, height, width) in [0, 1]
        return as_grid(self.pipeline, images)

    def _stop_drawing(self, pipeline: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        pipeline._interrupt = self.trainer.stop.received
        return tensors


def as_grid(pipeline: DiffusionPipeline, images: torch.Tensor) -> Image.Image:
    """Images, `(count, channels, height, width)` in [0, 1], in rows of ten."""
    return grid_of(pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(images)))


def save_averages(trainer: Trainer, pipeline: DiffusionPipeline, folder: Path) -> bool:
    """
    Saves the pipeline with each moving average: the first as `pipeline`, the others with their rate in the name. Whether
    this process could write all.
    """
    written = 0
    for decay in trainer.args.ema_decay:
        name = "pipeline" if decay == trainer.args.ema_decay[0] else f"pipeline-ema-{decay:g}"
        if trainer.accelerator.is_main_process:
            with trainer.averaged_weights(decay), trainer.surviving(name):
                with atomic_folder(folder / name) as partial:
                    pipeline.save_pretrained(partial)
                written += 1
    return written == len(trainer.args.ema_decay)


def train_pipeline(
    trainer: Trainer,
    objective: DenoisingObjective,
    pipeline: DiffusionPipeline,
    grid: Grid,
    class_names: list[str] | None,
    held_out: LabelledImages | None,
) -> None:
    """
    Trains a pipeline's UNet, and saves the pipeline with each moving average, its card, and pictures on the way.

    Args:
        trainer: Of the UNet.
        objective: What it is trained by.
        pipeline: That holds it.
        grid: Its pictures.
        class_names: For the card.
        held_out: Images to measure the losses on.
    """
    args, accelerator = trainer.args, trainer.accelerator
    loader = None
    if held_out is not None:
        loader = DataLoader(held_out, batch_size=args.train_batch_size, generator=torch.Generator())
        loader = accelerator.prepare(loader)

    folder, background = args.output_dir / "pipeline", BackgroundPush(args)

    def add_card() -> None:
        facts = (type(pipeline).__name__, trainer.images.num_images, class_names, trainer.global_step)
        write_card(args, accelerator, folder, *facts)

    def validate() -> None:
        saved = save_averages(trainer, pipeline, args.output_dir)
        if loader is not None:
            objective.measure(trainer, loader)
        grid.save()
        due = args.push_every is not None and trainer.global_step % args.push_every == 0
        going_on = trainer.global_step < args.max_train_steps and not trainer.stop.received
        if due and going_on and saved:
            with trainer.surviving("what is to be pushed"):
                add_card()
                background.start(folder)

    trainer.train(objective, validate)
    if accelerator.is_main_process and trainer.finished:
        add_card()
        if args.push_to_hub:
            background.finish()
            publish(args, folder)
