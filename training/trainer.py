"""Loop over optimizer steps, shared by the training scripts."""

import contextlib
import datetime
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from diffusers import ModelMixin
from PIL import Image
from tqdm.auto import tqdm

from diffusers_adm.atomic_files import naming_write_errors
from diffusers_adm.command_line import RunFailed
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.options import option_values
from diffusers_adm.training.averages import MovingAverages
from diffusers_adm.training.checkpointing import Checkpointer, TrainingState
from diffusers_adm.training.metrics import LossMeans, append_metrics, drop_metrics_after
from diffusers_adm.training.objective import Objective
from diffusers_adm.training.options import AverageOptions, TrainingOptions
from diffusers_adm.training.plan import describe_run, images_per_step
from diffusers_adm.training.pretrained import add_adapter, start_from_pretrained
from diffusers_adm.training.pretrained_options import warn_of_another_schedule
from diffusers_adm.training.run_folder import set_aside_earlier_run
from diffusers_adm.training.schedule import Schedule
from diffusers_adm.training.setup import (
    build_loader,
    build_lr_scheduler,
    build_optimizer,
    check_number_of_images,
    prepare_model,
    warn_of_lost_brightness,
)
from diffusers_adm.training.stopping import StopRequest


logger = get_logger(__name__)


class Trainer:
    """
    Runs optimizer steps, and saves the state that a run needs to continue after an interruption.

    Args:
        options: Options of the run.
        accelerator: Accelerator that `set_up_accelerator` returned.
        model: Model to train.
        images: Training images.
        averages: Settings of the moving averages. The default is no moving average.
        sampler: Timestep sampler, whose state is saved in checkpoints.
        checkpoint: Checkpoint to resume from. `None` for a new run.

    Raises:
        ValueError: If there are too few images, or the run cannot be resumed from the checkpoint.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        model: ModelMixin,
        images: LabelledImages | StreamedImages,
        averages: AverageOptions | None = None,
        sampler: torch.nn.Module | None = None,
        checkpoint: Path | None = None,
    ):
        self.options = options
        self.accelerator = accelerator
        optimisation = options.optimisation
        check_number_of_images(optimisation.train_batch_size, images.num_images, accelerator.num_processes)
        self.schedule = Schedule(options)
        self.metrics_file = options.output.output_dir / "metrics.jsonl"
        self.stop = StopRequest(accelerator)
        self.checkpointer = Checkpointer(options, accelerator, self.stop)
        if checkpoint is not None:
            self.checkpointer.check(checkpoint, images)
        else:
            start_from_pretrained(model, options.architecture)
            warn_of_another_schedule(model, options)
            if options.architecture.pretrained_model_name_or_path is None:
                warn_of_lost_brightness(model)
        add_adapter(model, options.architecture.lora_rank)
        prepare_model(model, options, accelerator)
        optimizer = build_optimizer(model, optimisation, scaled=accelerator.scaler is not None)
        lr_scheduler = build_lr_scheduler(optimizer, optimisation)
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        self.loader = build_loader(images, options, accelerator)
        self.averages = MovingAverages(
            self.unwrapped_model,
            averages or AverageOptions(ema_decay=()),
            accelerator.device,
            optimisation.max_train_steps,
        )
        self.state = TrainingState(images, self.averages, sampler)
        self.means = LossMeans(options.diffusion.num_train_timesteps)
        self.grad_norm = torch.tensor(0.0)
        self.skipped_in_a_row = 0
        self.logged_at, self.logged_step = time.monotonic(), 0
        self.began_at, self.began_step = self.logged_at, self.logged_step
        if checkpoint is not None:
            self.checkpointer.load(checkpoint, self.state)
            self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Replaces the loaded learning rate by `--learning_rate`, which a resumed run may change."""
        learning_rate, scheduler = self.options.optimisation.learning_rate, self.lr_scheduler.scheduler
        scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, scheduler.lr_lambdas):
            group["initial_lr"] = learning_rate
            group["lr"] = learning_rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def global_step(self) -> int:
        """Number of optimizer steps so far."""
        return self.state.global_step

    @property
    def is_last_step(self) -> bool:
        """Whether all steps were taken."""
        return self.global_step == self.options.optimisation.max_train_steps

    @property
    def finished(self) -> bool:
        """Whether all steps were taken and the last one was validated. It is false in a dry run."""
        return self.is_last_step and self.state.validated_step == self.global_step and not self.options.dry_run

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        """The model without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, objective: Objective, validations: Sequence[Callable[["Trainer"], None]] = ()) -> None:
        """
        Takes optimizer steps up to `max_train_steps`, or until the process is asked to stop. A checkpoint is saved in both cases. A
        dry run takes no step, but reads one batch.

        Args:
            objective: Function that computes the loss of the model for a batch.
            validations: Functions that are called with this trainer, at the steps of the schedule and at the end. They are called
                on all processes, with the model in eval mode. They must not draw from the global random state, because a resumed
                run would then differ, and must return early if `stop` was received. Their attribute `action`, if any, describes
                them in the log.

        Raises:
            RunFailed: If the loss, its gradient or a weight is not finite, or fp16 has overflowed `max_skipped_steps` times in a
                row. The last checkpoint is older than the failure.
        """
        actions = [validation.action for validation in validations if hasattr(validation, "action")]
        if not self.options.dry_run:  # the plan of a dry run has the same facts
            described = describe_run(self.options, self.accelerator, self.unwrapped_model, self.state.images)
            self.accelerator.print(described)
        self.accelerator.print(self.schedule.describe(actions), flush=True)
        if self.options.dry_run:
            next(self.batches(), None)  # raises if images and options do not fit
            return
        self._open_output()
        self.model.train()
        with self.stop.listening(), self._progress_bar() as progress:
            self._take_steps(objective, validations, progress)
        # `Accelerator.end_training` would also end the group of processes, which an ablation needs for the next run.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def _open_output(self) -> None:
        output = self.options.output
        if self.accelerator.is_main_process:
            output.output_dir.mkdir(parents=True, exist_ok=True)
            if self.checkpointer.continues_folder:
                drop_metrics_after(self.metrics_file, self.global_step, validated=not self._validation_is_due())
            else:
                set_aside_earlier_run(output.output_dir)
        if output.report_to:
            values = {name: str(value) for name, value in option_values(self.options).items() if name != "hub_token"}
            self.accelerator.init_trackers("diffusers-adm", config=values)

    def _take_steps(self, objective: Objective, validations: Sequence[Callable], progress: tqdm) -> None:
        self.logged_at, self.logged_step = time.monotonic(), self.global_step
        self.began_at, self.began_step = self.logged_at, self.logged_step
        if (
            self.checkpointer.saved_step != self.global_step
        ):  # resumed from a copy or from another folder, which may not stay
            self.save_checkpoint(must_succeed=True)
        if self._validation_is_due():  # the run was stopped or killed before its last validation
            self._validate(validations)
        for batch in self._saving_before_errors(self.batches()):
            with self.accelerator.accumulate(self.model):
                terms = objective(self.model, batch)
                self.accelerator.backward(terms.loss.mean())
                if self.accelerator.sync_gradients:
                    self.grad_norm = self._gradient_norm()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.means.add(terms)
            self.state.images_into_epoch += self._images_per_batch
            if not self.accelerator.sync_gradients:
                continue
            self._finish_step()
            progress.update()
            if self._stops_after_step(validations):
                self.accelerator.print(
                    f"Stopped after saving checkpoint-{self.global_step}. Pass --resume_from_checkpoint latest to continue.",
                    flush=True,
                )
                return

    def _saving_before_errors(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields batches. If the next one cannot be read, saves a checkpoint before the error is raised."""
        try:
            yield from batches
        except Exception:  # decoders, files and the network raise many types
            # Other processes would wait for a batch. In the middle of accumulated batches, the state is not that of a step.
            is_new = self.global_step > self.checkpointer.saved_step
            if is_new and self.accelerator.num_processes == 1 and self.accelerator.sync_gradients:
                self.save_checkpoint()
                self.accelerator.print(
                    f"The next images cannot be read. {self.checkpointer.describe_last()}", flush=True
                )
            raise

    def batches(self) -> Iterator[dict]:
        """Yields the batches from the current position in the data to the end of the run, pass after pass."""
        max_train_steps = self.options.optimisation.max_train_steps
        while self.global_step < max_train_steps:
            for batch in self._rest_of_epoch():
                if self.options.optimisation.channels_last:
                    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
                yield batch
                if self.global_step >= max_train_steps:
                    return
            self.state.epoch, self.state.images_into_epoch = self.state.epoch + 1, 0

    def _rest_of_epoch(self) -> Iterable[dict]:
        """Returns the remaining batches of the epoch. An epoch of a stream never ends."""
        state = self.state
        batches = state.images_into_epoch // self._images_per_batch
        if isinstance(state.images, StreamedImages):
            stream = state.images.from_batch(self.loader, batches)
            return (send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in stream)
        state.images.set_epoch(state.epoch)
        loader = self.accelerator.skip_first_batches(self.loader, batches) if batches else self.loader
        loader.set_epoch(state.epoch)
        return loader

    @property
    def _images_per_batch(self) -> int:
        """Number of images per forward pass of all processes."""
        return self.options.optimisation.train_batch_size * self.accelerator.num_processes

    def _gradient_norm(self) -> torch.Tensor:
        max_grad_norm = self.options.optimisation.max_grad_norm
        if max_grad_norm is not None:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.accelerator.unscale_gradients(self.optimizer)
        return torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        )

    def _finish_step(self) -> None:
        """Counts a step. If loss scaling skipped it, the averages and the learning rate stay as they are."""
        if self.accelerator.optimizer_step_was_skipped:
            self.grad_norm = torch.zeros_like(self.grad_norm)  # it was not finite, but had no effect
            self.state.skipped_steps += 1
            self.skipped_in_a_row += 1
            self.means.drop_step()
            if self.skipped_in_a_row >= self.options.optimisation.max_skipped_steps:
                raise RunFailed(
                    f"{self.skipped_in_a_row} steps in a row overflowed fp16 before step {self.global_step}. Try"
                    f" --mixed_precision bf16. {self.checkpointer.describe_last()}"
                )
        else:
            self.skipped_in_a_row = 0
            self.means.keep_step()
            self.lr_scheduler.step()
            self.averages.update()
        self.state.global_step += 1

    def _stops_after_step(self, validations: Sequence[Callable]) -> bool:
        """
        Logs, saves and validates where the schedule says so. Returns whether the run was asked to stop.

        The checkpoint is saved before the validation. If the run ends between the two, a resumed run validates first. Validations save
        pipelines, and a folder with a pipeline but no checkpoint could not be continued, so the first one always follows a checkpoint.
        """
        last, stopping = self.is_last_step, self.stop.agreed()
        if stopping or self.schedule.logging.is_due(self.global_step):
            self._log_training()
        is_first = self._validation_is_due() and not self.checkpointer.saved_step
        if last or stopping or is_first or self.schedule.saving.is_due(self.global_step):
            self.save_checkpoint(must_succeed=last or stopping)
        if not stopping and self._validation_is_due():
            self._validate(validations)
            stopping = self.stop.agreed()
            if stopping and self.checkpointer.saved_step != self.global_step:
                self.save_checkpoint(must_succeed=True)
        return stopping

    def _validation_is_due(self) -> bool:
        due = self.is_last_step or self.schedule.validating.is_due(self.global_step)
        return due and self.state.validated_step != self.global_step

    def _validate(self, validations: Sequence[Callable]) -> None:
        self._check_state()  # validations save pipelines
        with self._uncounted():
            self.model.eval()
            for validation in validations:
                validation(self)
            self.model.train()
            self.accelerator.wait_for_everyone()
        if not self.stop.agreed():
            with self.reporting_write_errors(f"checkpoint-{self.global_step}"):
                self.checkpointer.mark_validated(self.state)

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Excludes the time spent inside the context from `images_per_second`."""
        began = time.monotonic()
        yield
        self.logged_at += time.monotonic() - began

    def save_checkpoint(self, must_succeed: bool = False) -> None:
        """
        Writes a checkpoint, see [`Checkpointer.save`].

        Raises:
            RunFailed: If the loss, its gradient or a weight is not finite.
        """
        self._check_state()
        with self._uncounted():
            self.checkpointer.save(self.state, must_succeed)

    def _check_state(self) -> None:
        """Raises a `RunFailed` on all processes if the loss, its gradient or a weight is not finite on any process."""
        weights = [*self.unwrapped_model.state_dict().values(), *self.averages.tensors()]
        largest = torch.nn.utils.get_total_norm([weight.detach() for weight in weights], math.inf)
        finite = self.means.finite().item() and self.grad_norm.isfinite().item() and largest.isfinite().item()
        self._check_finite(not self.stop.on_any_process(not finite))

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise RunFailed(
                f"The loss, its gradient or a weight is not finite before step {self.global_step}. Try a lower"
                f" --learning_rate, or --max_grad_norm 1. {self.checkpointer.describe_last()}"
            )

    def _log_training(self) -> None:
        values = self.means.take(self.accelerator)
        steps, seconds = self.global_step - self.logged_step, time.monotonic() - self.logged_at
        images = steps * images_per_step(self.options.optimisation, self.accelerator)
        values["grad_norm"] = self.grad_norm.item()
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        values["images_per_second"] = images / seconds
        if self.accelerator.scaler is not None:
            values["loss_scale"] = self.accelerator.scaler.get_scale()
        if self.accelerator.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.log(values)
        self._check_finite(math.isfinite(values.get("loss", 0.0)))
        self.logged_at, self.logged_step = time.monotonic(), self.global_step

    def log(self, values: dict[str, float]) -> None:
        """Appends values to `metrics.jsonl`, prints them, and passes them on to the trackers."""
        with self.reporting_write_errors(self.metrics_file.name):
            self.accelerator.log(values, step=self.global_step)
            if self.accelerator.is_main_process:
                append_metrics(self.metrics_file, self.global_step, values)
                brief = {name: value for name, value in values.items() if "_quarter_" not in name} or values
                shown = ", ".join(f"{name} {value:.4g}" for name, value in brief.items())
                tqdm.write(f"{self._describe_progress()}: {shown}")

    def _describe_progress(self) -> str:
        """Returns the step, the elapsed time of this process, and an estimate of the remaining time."""
        last, done = self.options.optimisation.max_train_steps, self.global_step - self.began_step
        elapsed = time.monotonic() - self.began_at
        words = f"step {self.global_step} of {last}, {datetime.timedelta(seconds=round(elapsed))} elapsed"
        if not done:
            return words
        remaining = elapsed / done * (last - self.global_step)
        return f"{words}, {datetime.timedelta(seconds=round(remaining))} left"

    def log_picture(self, name: str, picture: Image.Image) -> None:
        """Passes a picture on to the trackers that accept pictures."""
        pixels = np.asarray(picture.convert("RGB"))[None]  # (1, height, width, 3)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                # TensorBoard expects channels first, and other trackers expect them last.
                values = pixels.transpose(0, 3, 1, 2) if tracker.name == "tensorboard" else pixels
                tracker.log_images({name: values}, step=self.global_step)

    @contextlib.contextmanager
    def reporting_write_errors(self, name: str) -> Iterator[None]:
        """Logs write errors inside the context, because the disk may have space later. At the last step, it raises them."""
        try:
            with naming_write_errors(self.options.output.output_dir / name):
                yield
        except OSError as error:
            if self.is_last_step:
                raise
            logger.error("Cannot write %s: %s", name, error)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.options.optimisation.max_train_steps,
            initial=self.global_step,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,  # None: shown on a terminal only
        )
