"""Validations: callables that the trainer calls in turn (see `Trainer.train`)."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_adm.atomic_files import atomic_folder, atomic_write
from diffusers_adm.data.grids import grid_of
from diffusers_adm.training.calibration import expected_calibration_error
from diffusers_adm.training.metrics import NUM_QUARTERS, LossMeans, quarter_of
from diffusers_adm.training.objective import (
    ClassifierObjective,
    DenoisingObjective,
    LossTerms,
    NoiseLevelObjective,
)
from diffusers_adm.training.pretrained import save_adapter
from diffusers_adm.training.publishing import BackgroundPush
from diffusers_adm.training.trainer import Trainer


@contextlib.contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random states of the CPU and of a device inside the context, and restores them at its end."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    state = None if module is None else module.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        if module is not None:
            module.set_rng_state(state)


class HeldOutLoss:
    """
    Logs the losses of the averaged weights on held-out images. Noise and its levels are the same each time.

    Args:
        objective: Objective of the training.
        loader: Loader of the held-out images, prepared by `accelerator`.
        seed: Seed of the run.
    """

    action = "measures losses on held-out images"

    def __init__(self, objective: DenoisingObjective | NoiseLevelObjective, loader: DataLoader, seed: int):
        self.objective = objective
        self.loader = loader
        self.seed = seed

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> None:
        accelerator, device = trainer.accelerator, trainer.accelerator.device
        means = LossMeans(trainer.options.diffusion.num_train_timesteps)
        seed = self.seed + accelerator.process_index
        with trainer.averages.applied(trainer.averages.decays[0]), own_random_state(seed, device):
            for batch in self.loader:
                terms = self.objective.held_out_terms(trainer.model, batch)
                gathered = accelerator.gather_for_metrics((terms.loss, terms.logged, terms.timestep))
                means.add(LossTerms(*gathered))
                if trainer.stop.agreed():
                    return
        means.keep_step()
        trainer.log({f"validation_{name}": value for name, value in means.take(accelerator).items()})


class HeldOutAccuracy:
    """
    Logs loss, accuracy and calibration error of a classifier on held-out images, over all timesteps and per quarter. Timesteps and
    noise are the same each time.

    Args:
        objective: Objective of the training.
        loader: Loader of the held-out images, prepared by `accelerator`.
        seed: Seed of the run.
    """

    action = "measures loss and accuracy on held-out images"

    def __init__(self, objective: ClassifierObjective, loader: DataLoader, seed: int):
        self.objective = objective
        self.loader = loader
        self.seed = seed

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> None:
        accelerator, num_timesteps = trainer.accelerator, len(self.objective.schedule)
        # A separate generator, because training draws from the global random state.
        generator = torch.Generator(accelerator.device).manual_seed(self.seed + accelerator.process_index)
        gathered = []
        for batch in self.loader:
            logits, timestep = self.objective.noised_logits(trainer.model, batch["image"], generator)
            terms = self.objective.terms(logits, batch["label"], timestep)
            confidence = logits.softmax(dim=1).amax(dim=1)  # (batch,)
            columns = [quarter_of(timestep, num_timesteps), confidence, terms.loss, *terms.logged.values()]
            gathered.append(accelerator.gather_for_metrics(torch.stack([c.float() for c in columns], dim=1)))
            if trainer.stop.agreed():
                return
        quarter, confidence, *columns = torch.cat(gathered).unbind(dim=1)
        columns = dict(zip(("loss", *terms.logged), columns))
        values = {}
        for suffix in ("", *(f"_quarter_{q}" for q in range(NUM_QUARTERS))):
            inside = quarter == int(suffix[-1]) if suffix else torch.ones_like(quarter, dtype=torch.bool)
            if inside.any():
                for name, column in columns.items():
                    values[f"validation_{name}{suffix}"] = column[inside].mean().item()
                error = expected_calibration_error(confidence[inside], columns["accuracy"][inside])
                values[f"validation_calibration_error{suffix}"] = error
        trainer.log(values)


class SampleGrid:
    """
    Draws a sample grid with the same seeds and labels each time. Images of the averaged weights are on the left, and images of the
    current weights are on the right.

    Args:
        accelerator: Accelerator of the script.
        pipeline: Pipeline of the model. Images are drawn with DDIM, or by the pipeline's scheduler if the UNet is given the noise
            level.
        inputs: Function that returns the arguments of the pipeline for images with given numbers, which begin at 0.
        num_images: Number of images.
        batch_size: Number of images drawn per batch. They must fit in memory with the training state.
        shown: Picture that is shown on the left of both.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: DiffusionPipeline,
        inputs: Callable[[list[int]], dict],
        num_images: int,
        batch_size: int,
        shown: Image.Image | None = None,
    ):
        self.accelerator = accelerator
        self.pipeline = copy.copy(pipeline)  # a copy, because the saved pipeline keeps its scheduler
        self.num_steps = 20  # steps of Heun's method, which evaluates the UNet twice per step
        if isinstance(pipeline.scheduler, CMStochasticIterativeScheduler):
            self.num_steps = pipeline.config.num_inference_steps
        elif pipeline.unet.config.preconditioning is None:
            self.pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
            self.num_steps = min(50, pipeline.scheduler.config.num_train_timesteps)
        self.pipeline.set_progress_bar_config(disable=True)
        self.inputs = inputs
        self.num_images = num_images
        self.batch_size = batch_size
        self.shown = shown
        self.action = f"draws {num_images} image{'s' * (num_images != 1)}"

    def __call__(self, trainer: Trainer) -> None:
        """Writes `samples/step-N.png`. Each process draws a share of the images."""
        with trainer.averages.applied(trainer.averages.decays[0]):
            averaged = self.draw(trainer)
        raw = self.draw(trainer)
        if trainer.stop.agreed() or not self.accelerator.is_main_process:
            return
        panels = [averaged, raw] if self.shown is None else [self.shown, averaged, raw]
        margin = self.pipeline.unet.config.sample_size // 2
        width = len(panels) * (averaged.width + margin) - margin
        picture = Image.new(averaged.mode, (width, averaged.height), "grey")
        for number, panel in enumerate(panels):
            picture.paste(panel, (number * (averaged.width + margin), 0))
        path = trainer.options.output.output_dir / "samples" / f"step-{trainer.global_step}.png"
        with trainer.reporting_write_errors(path.name):
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as partial:
                picture.save(partial)
            trainer.log_picture("samples", picture)

    def draw(self, trainer: Trainer) -> Image.Image:
        """Draws the images. The number of an image is its seed."""

        def interrupt(pipeline: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
            pipeline._interrupt = trainer.stop.received
            return tensors

        # Every process draws the same number of images, because they are gathered. Surplus images are dropped.
        share = -(-self.num_images // self.accelerator.num_processes)
        numbers = [self.accelerator.process_index * share + i for i in range(share)]
        drawn = []
        for batch in torch.tensor(numbers).split(self.batch_size):
            batch = batch.tolist()
            drawn.append(
                self.pipeline(
                    **self.inputs(batch),
                    num_inference_steps=self.num_steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    output_type="pt",
                    callback_on_step_end=interrupt,
                ).images
            )
        images = self.accelerator.gather(torch.cat(drawn))[: self.num_images]  # (images, channels, height, width)
        return as_grid(self.pipeline, images)


def as_grid(pipeline: DiffusionPipeline, images: torch.Tensor) -> Image.Image:
    """Lays out images, `(images, channels, height, width)` in [0, 1], in rows of ten with gaps."""
    return grid_of(pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(images)), gap=2)


class SavedPipelines:
    """
    Saves a pipeline with each moving average. The first is saved as `pipeline`, and all others as `pipeline-ema-RATE`.

    Args:
        pipeline: Pipeline of the model.
    """

    action = "saves the pipeline"

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.complete = False  # whether the last call has written all pipelines

    def __call__(self, trainer: Trainer) -> None:
        self.complete = False
        if not trainer.accelerator.is_main_process:
            return
        written = 0
        for number, decay in enumerate(trainer.averages.decays):
            name = f"pipeline-ema-{decay:g}" if number else "pipeline"
            folder = trainer.options.output.output_dir / name
            with trainer.averages.applied(decay), trainer.reporting_write_errors(name):
                with atomic_folder(folder) as partial:
                    self.pipeline.save_pretrained(partial)
                    save_adapter(self.pipeline.unet, partial)
                written += 1
        self.complete = written == len(trainer.averages.decays)


class RegularPush:
    """
    Uploads the saved pipeline every `push_every` steps while the training goes on.

    Args:
        push_every: Number of steps between uploads.
        saved: Validation that saves the pipeline. It must be called before this one.
        push: Upload in the background.
        write_card: Function that writes the model card of the saved pipeline.
    """

    def __init__(self, push_every: int, saved: SavedPipelines, push: BackgroundPush, write_card: Callable[[], None]):
        self.push_every = push_every
        self.saved = saved
        self.push = push
        self.write_card = write_card

    def __call__(self, trainer: Trainer) -> None:
        due = trainer.global_step % self.push_every == 0 and not trainer.is_last_step
        if due and self.saved.complete and not trainer.stop.received:
            with trainer.reporting_write_errors("partial-push"):
                self.write_card()
                self.push.start(trainer.options.output.output_dir / "pipeline")
