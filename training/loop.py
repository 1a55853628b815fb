"""What the training scripts share: one loop over optimizer steps, checkpoints, moving averages, logs."""

import argparse
import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    send_to_device,
    set_seed,
)
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_adm.atomic_files import atomic_write, flush_folder, partial_folder, replace_folder
from diffusers_adm.data.datasets import LabelledImages, StreamedImages
from diffusers_adm.launch import join_processes
from diffusers_adm.quiet import without_warning
from diffusers_adm.training.arguments import as_yaml, check_number_of_images, contradictions
from diffusers_adm.training.checkpoints import list_checkpoints, remove_old_checkpoints
from diffusers_adm.training.metrics import Means, read_metrics
from diffusers_adm.training.stopping import StopRequest, leave_signals_to_the_trainer


logger = get_logger(__name__)

CHECKPOINT_FILES = ("model.safetensors", "optimizer.bin", "scheduler.bin", "options.yaml", "trainer_state.json")
# What a model that training starts from may differ in.
CLASS_OPTIONS = {"num_class_embeds", "use_null_class", "num_classes"}


def start(args: argparse.Namespace) -> Accelerator:
    """
    What a script does first: sets up the processes, then seeds them, before anything is drawn at random.

    Raises:
        ValueError: If the processes cannot be joined, `total_batch_size` cannot be divided among them, or they would divide the
            weights.
    """
    processes = join_processes()
    if args.total_batch_size is not None:
        at_once = args.train_batch_size * processes.num_processes
        if args.total_batch_size < at_once or args.total_batch_size % at_once:
            raise ValueError(
                f"--total_batch_size {args.total_batch_size} is not a multiple of {at_once}, which is --train_batch_size"
                " times the number of processes."
            )
        args.gradient_accumulation_steps = args.total_batch_size // at_once
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # An epoch's last batches do not make a step by themselves: its gradient would be too small.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
        dynamo_backend="inductor" if args.compile else None,
    )
    check_distribution(accelerator.distributed_type)
    set_seed(args.seed, device_specific=True)
    return accelerator


def check_distribution(distributed_type: DistributedType) -> None:
    """Raises a ValueError if weights would be divided among processes, which averages and checkpoints do not know of."""
    if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"These scripts do not run under {distributed_type.value}: launch them with --multi_gpu, which gives each process"
            " all weights, and save memory by --gradient_checkpointing, --offload_ema and --use_8bit_adam."
        )


def load_pretrained(model: ModelMixin, args: argparse.Namespace) -> None:
    """
    Gives a model the weights of a saved one. If they differ in their classes, what depends on them keeps its random
    weights, and a message says so; a null class that is new joins the classes that are known.

    Raises:
        ValueError: If the two differ in anything else.
    """
    name = args.pretrained_model_name_or_path
    pretrained = type(model).from_pretrained(name, subfolder=args.pretrained_subfolder)
    # Through JSON, as the saved one's has come: it knows no tuples.
    ours, theirs = json.loads(model.to_json_string()), json.loads(pretrained.to_json_string())
    differing = {option for option in ours if not option.startswith("_") and ours[option] != theirs[option]}
    differing.discard("dropout")
    if differing - CLASS_OPTIONS:
        pairs = ", ".join(f"{option} {theirs[option]} instead of {ours[option]}" for option in sorted(differing))
        raise ValueError(f"--pretrained_model_name_or_path {name} is of another architecture: {pairs}.")
    known, anew = pretrained.state_dict(), []
    for key, tensor in model.state_dict().items():
        if key in known and known[key].shape == tensor.shape:
            tensor.copy_(known[key])
        elif key in known and differing == {"use_null_class"}:
            rows = min(len(known[key]), len(tensor))
            tensor[:rows].copy_(known[key][:rows])
        else:
            anew.append(key)
    if anew:
        pairs = ", ".join(f"{option} {ours[option]} instead of {theirs[option]}" for option in sorted(differing))
        logger.warning("%s begin with random weights: %s.", ", ".join(anew), pairs)


class Trainer:
    """
    Runs optimizer steps, and keeps what they need to go on after an interruption.

    Args:
        args: Parsed options.
        accelerator: Of `start`.
        model: What is trained.
        images: Its training images.
        ema_decays: Constant rates of the moving averages of the weights.
        stateful: Object with a `state_dict` that belongs to the state of the training.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: torch.nn.Module,
        images: LabelledImages | StreamedImages,
        ema_decays: tuple[float, ...] = (),
        stateful: torch.nn.Module | None = None,
    ):
        self.args = args
        self.accelerator = accelerator
        self.images = images
        check_number_of_images(args, images.num_images, accelerator.num_processes)
        if args.resume_from_checkpoint is None and list_checkpoints(args.output_dir):
            raise ValueError(
                f"--output_dir {args.output_dir} holds checkpoints: pass --resume_from_checkpoint latest, or another"
                " folder."
            )
        checkpoint = self._find_checkpoint()
        if checkpoint is not None:
            self._check_resumable(checkpoint)
        elif args.pretrained_model_name_or_path:
            load_pretrained(model, args)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
        if on_cpu and "DIFFUSERS_ATTN_BACKEND" not in os.environ:
            # The backward pass of torch's fused attention takes four times as long there.
            with without_warning("Attention backends are an experimental feature"):
                model.set_attention_backend("_native_math")
        optimizer = self._build_optimizer(model)
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        streaming = isinstance(images, StreamedImages)
        loader = DataLoader(
            images,
            batch_size=args.train_batch_size,
            shuffle=None if streaming else True,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=accelerator.device.type == "cuda",
            # Of its own: each pass draws a seed for the workers, and what the model draws must not depend on how many
            # passes a run has begun.
            generator=torch.Generator(),
        )
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        # A stream is this process's own already.
        self.loader = loader if streaming else accelerator.prepare(loader)
        if stateful is not None:
            accelerator.register_for_checkpointing(stateful)
        self.averages = {decay: self._build_average(decay) for decay in ema_decays}
        self.stop = StopRequest(accelerator)
        self.means = Means()
        self.global_step = 0
        self.saved_step = 0
        self.skipped_steps = 0
        self.epoch = 0
        self.images_into_epoch = 0
        self.grad_norm = torch.tensor(0.0)
        if accelerator.is_main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.report_to:
            config = {name: str(value) for name, value in vars(args).items() if name != "hub_token"}
            accelerator.init_trackers("diffusers-adm", config=config)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _build_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        args = self.args
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "weight_decay": args.adam_weight_decay,
            "eps": args.adam_epsilon,
        }
        if args.use_8bit_adam:
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
            return AdamW8bit(model.parameters(), **options)
        # Under fp16's loss scaling the fused kernel skips a step by itself, and nobody learns of it.
        return torch.optim.AdamW(model.parameters(), fused=self.accelerator.scaler is None, **options)

    def _build_average(self, decay: float) -> EMAModel:
        args = self.args
        if not args.use_ema_warmup and args.max_train_steps < 5 / (1 - decay):
            logger.warning(
                "An average of rate %g remembers the initial weights for %d steps; this run takes %d.",
                decay, round(5 / (1 - decay)), args.max_train_steps,
            )  # fmt: skip
        # A least rate and no step before the first make the rate constant, as ADM's is; EMAModel by itself ramps it up.
        average = EMAModel(
            self.unwrapped_model.parameters(),
            decay=decay,
            min_decay=0.0 if args.use_ema_warmup else decay,
            update_after_step=-1,
            use_ema_warmup=args.use_ema_warmup,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            foreach=True,
        )
        average.to("cpu" if args.offload_ema else self.accelerator.device)
        return average

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, and the run was not asked to stop before it was validated."""
        return self.global_step == self.args.max_train_steps and not self.stop.received

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        """The model without what accelerate wraps round it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(
        self,
        losses: Callable[[torch.nn.Module, dict], dict[str, torch.Tensor]],
        validate: Callable[[], None] | None = None,
    ) -> None:
        """
        Takes optimizer steps up to `max_train_steps`, or until the process is asked to stop; a checkpoint is left then.

        Args:
            losses: Of the model and a batch, terms `(batch,)` to log; `"loss"` is minimised, and `"quarter"` is that of
                the timesteps, an integer.
            validate: Called every `validation_steps` and at the end, on all processes, with the model in eval mode. It
                draws nothing from the global random state, which a resumed run would miss, and returns early if
                `stop` was received.

        Raises:
            RuntimeError: If the loss or its gradient is not finite, or fp16 has overflowed `max_skipped_steps` times in a row; the last
                checkpoint is from before.
        """
        self.model.train()
        with self.stop.listening(), self._progress_bar() as progress:
            finished = self._run(losses, validate, progress)
            # Outside the steps: a run that was stopped in its last validation does it again when it resumes.
            if finished and validate is not None:
                self._validate(validate)
            self.stop.received = self.stop.agreed()  # `finished` is to be the same on all processes
        self.accelerator.end_training()

    def _run(self, losses: Callable, validate: Callable | None, progress: tqdm) -> bool:
        """Whether all steps were taken."""
        args, accelerator = self.args, self.accelerator
        pending, skipped_in_a_row = None, 0
        self.logged_at, self.logged_step = time.monotonic(), self.global_step
        while self.global_step < args.max_train_steps:
            for batch in self._epoch_loader():
                with accelerator.accumulate(self.model):
                    if args.channels_last:
                        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
                    terms = losses(self.model, batch)
                    accelerator.backward(terms["loss"].mean())
                    if accelerator.sync_gradients:
                        self.grad_norm = self._gradient_norm()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                sums = Means.of_batch(terms)
                pending = sums if pending is None else pending + sums
                self.images_into_epoch += args.train_batch_size * accelerator.num_processes
                if not accelerator.sync_gradients:
                    continue

                # A step that fp16's loss scaling skipped changed nothing: neither the averages nor the rate move.
                if accelerator.optimizer_step_was_skipped:
                    self.grad_norm = torch.zeros_like(self.grad_norm)  # it was not finite, but changed nothing
                    self.skipped_steps += 1
                    skipped_in_a_row += 1
                    if skipped_in_a_row >= args.max_skipped_steps:
                        raise RuntimeError(
                            f"{skipped_in_a_row} steps in a row overflowed fp16 before step {self.global_step}: try"
                            f" --mixed_precision bf16. {self._last_checkpoint()}"
                        )
                else:
                    skipped_in_a_row = 0
                    self.means.add([name for name in terms if name != "quarter"], pending)
                    self.lr_scheduler.step()
                    self._update_averages()
                pending = None
                self.global_step += 1
                progress.update()

                last = self.global_step == args.max_train_steps
                stopping = self.stop.agreed()
                if self.global_step % args.logging_steps == 0:
                    self._log_training()
                if last or stopping or self.global_step % args.checkpointing_steps == 0:
                    self.save_checkpoint(must_succeed=last or stopping)
                if validate is not None and not last and not stopping:
                    if self.global_step % args.validation_steps == 0:
                        self._validate(validate)
                        stopping = self.stop.agreed()
                        if stopping and self.saved_step != self.global_step:
                            self.save_checkpoint(must_succeed=True)
                if stopping and not last:
                    accelerator.print(f"Asked to stop: saved checkpoint-{self.global_step}.", flush=True)
                    return False
                if last:
                    return True
            self.epoch, self.images_into_epoch = self.epoch + 1, 0
        return True

    def _epoch_loader(self) -> Iterable[dict]:
        """The batches of the rest of the epoch; a stream's never ends."""
        batches = self.images_into_epoch // (self.args.train_batch_size * self.accelerator.num_processes)
        if isinstance(self.images, StreamedImages):
            stream = self.images.from_batch(self.loader, batches)
            return (send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in stream)
        self.images.set_epoch(self.epoch)
        loader = self.accelerator.skip_first_batches(self.loader, batches) if batches else self.loader
        loader.set_epoch(self.epoch)
        return loader

    def _gradient_norm(self) -> torch.Tensor:
        if self.args.max_grad_norm is not None:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.accelerator.unscale_gradients(self.optimizer)
        return torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        )

    def _update_averages(self) -> None:
        if not self.averages:
            return
        parameters = list(self.unwrapped_model.parameters())
        if self.args.offload_ema:
            parameters = [parameter.detach().cpu().requires_grad_() for parameter in parameters]
        for average in self.averages.values():
            average.step(parameters)

    def _validate(self, validate: Callable[[], None]) -> None:
        self.model.eval()
        validate()
        self.model.train()
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def averaged_weights(self, decay: float):
        """Puts a moving average in the place of the weights, for as long as the context lasts."""
        parameters = list(self.unwrapped_model.parameters())
        average = self.averages[decay]
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.args.max_train_steps,
            initial=self.global_step,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,  # None: shown on a terminal only
        )

    def _log_training(self) -> None:
        values = self.means.take(self.accelerator)
        steps, seconds = self.global_step - self.logged_step, time.monotonic() - self.logged_at
        images = steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
        values["grad_norm"] = self.grad_norm.item()
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        values["images_per_second"] = images * self.accelerator.num_processes / seconds
        if self.accelerator.scaler is not None:
            values["loss_scale"] = self.accelerator.scaler.get_scale()
        if self.accelerator.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.log(values)
        self._check_finite(math.isfinite(values.get("loss", 0.0)))
        self.logged_at, self.logged_step = time.monotonic(), self.global_step

    def log(self, values: dict[str, float]) -> None:
        """Appends to `metrics.jsonl`, prints, and passes on to the tracker."""
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            with self.surviving("metrics.jsonl"), open(self.args.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.global_step, **values}) + "\n")
            brief = {name: value for name, value in values.items() if "_quarter_" not in name} or values
            tqdm.write(
                f"step {self.global_step}: " + ", ".join(f"{name} {value:.4g}" for name, value in brief.items())
            )

    @contextlib.contextmanager
    def surviving(self, what: str):
        """Reports what cannot be written and goes on, but at the end of the run: by then the disk may have room."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if self.global_step == self.args.max_train_steps:
                raise
            logger.error("Cannot write %s: %s", what, error)

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise RuntimeError(
                f"The loss or its gradient is not finite before step {self.global_step}. {self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.args.output_dir)
        return f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."

    def save_checkpoint(self, must_succeed: bool = False) -> None:
        """
        Writes `checkpoint-N` under another name, flushes and renames it, and only then removes the oldest.

        Args:
            must_succeed: If not, training goes on when it cannot be written: the disk may have room the next time.
        """
        finite = self.means.finite().to(self.grad_norm.device) & self.grad_norm.isfinite()
        self._check_finite(not self.stop.on_any_process(not finite.item()))
        folder = self.args.output_dir / f"checkpoint-{self.global_step}"
        partial = partial_folder(folder)
        try:
            self._on_all(self._write_checkpoint, partial)
            # Not before all have written: names come and go in a folder that is written to.
            self._on_all(flush_folder, partial)
            self._on_all(self._put_in_place, partial, folder)
        except Exception as error:  # of safetensors, torch or the system, as it happens
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            if must_succeed:
                raise
            logger.error("Cannot write %s: %s. %s", folder, error, self._last_checkpoint())
            return
        self.saved_step = self.global_step

    def _on_all(self, task: Callable[..., None], *args: Path) -> None:
        """Carries out a task; raises on all processes if it fails on any, and returns when it is done on all."""
        failure = None
        try:
            task(*args)
        except Exception as error:
            failure = error
        if self.stop.on_any_process(failure is not None):
            raise failure or RuntimeError("another process could not write its part")

    def _write_checkpoint(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if isinstance(self.images, StreamedImages):
            self._positions_file(folder).write_text(json.dumps(self.images.positions))
        if not self.accelerator.is_main_process:
            return
        names = [name for name, _ in self.unwrapped_model.named_parameters()]
        for decay, average in self.averages.items():
            tensors = {name: shadow.contiguous() for name, shadow in zip(names, average.shadow_params)}
            save_file(tensors, folder / f"ema-{decay:g}.safetensors")
        state = {
            "global_step": self.global_step,
            "epoch": self.epoch,
            "images_into_epoch": self.images_into_epoch,
            "num_processes": self.accelerator.num_processes,
            "num_images": self.images.num_images,
            "averaged_steps": self.global_step - self.skipped_steps,
        }
        (folder / "options.yaml").write_text(as_yaml(self.args))
        (folder / "trainer_state.json").write_text(json.dumps(state))

    def _put_in_place(self, partial: Path, folder: Path) -> None:
        if self.accelerator.is_main_process:
            replace_folder(partial, folder)
            remove_old_checkpoints(self.args.output_dir, self.args.checkpoints_total_limit, self.args.keep_every)

    def _positions_file(self, folder: Path) -> Path:
        """Where this process has got to in its stream."""
        return folder / f"stream_{self.accelerator.process_index}.json"

    def _find_checkpoint(self) -> Path | None:
        name = self.args.resume_from_checkpoint
        if name is None:
            return None
        if name == "latest":
            # As the main process sees them: on a disk of its own another would find none, and silently begin.
            [checkpoints] = broadcast_object_list([list_checkpoints(self.args.output_dir)])
            if not checkpoints:
                self.accelerator.print(f"No checkpoint in {self.args.output_dir} yet: starting from the beginning.")
                return None
            return checkpoints[-1]
        folder = Path(name)
        if not (folder / "trainer_state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {name}: no checkpoint is there.")
        return folder

    def _check_resumable(self, folder: Path) -> None:
        """Raises a ValueError unless the checkpoint is of this run; warns where the rest of the run will be another."""
        missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} is not complete: {', '.join(missing)} missing.")
        differing = contradictions(self.args, (folder / "options.yaml").read_text())
        if differing:
            raise ValueError(f"{folder} was trained with other options: {', '.join(differing)}.")
        state = json.loads((folder / "trainer_state.json").read_text())
        now = {"num_processes": self.accelerator.num_processes, "num_images": self.images.num_images}
        for name, value in now.items():
            if state[name] != value:
                logger.warning(
                    "%s was written with %s %s, and this run has %s: the order of the images, what is drawn at random, or"
                    " the number of images a step differ from here on.",
                    folder, name, state[name], value,
                )  # fmt: skip

    def _resume(self, folder: Path) -> None:
        state = json.loads((folder / "trainer_state.json").read_text())
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # it counts batches, and a checkpoint lies between steps
        self._set_learning_rate()
        for decay, average in self.averages.items():
            saved = load_file(folder / f"ema-{decay:g}.safetensors")
            for (name, _), shadow in zip(self.unwrapped_model.named_parameters(), average.shadow_params):
                shadow.copy_(saved[name])
            average.optimization_step = state["averaged_steps"]
        self.global_step = state["global_step"]
        self.skipped_steps = state["global_step"] - state["averaged_steps"]
        self.epoch = state["epoch"]
        self.images_into_epoch = state["images_into_epoch"]
        if isinstance(self.images, StreamedImages):
            self._resume_stream(folder, state["num_processes"])
        self._forget_metrics_after(self.global_step)
        self.saved_step = self.global_step
        self.accelerator.print(f"Resumed from {folder} at step {self.global_step}.", flush=True)

    def _resume_stream(self, folder: Path, num_processes: int) -> None:
        if num_processes == self.accelerator.num_processes:
            positions = json.loads(self._positions_file(folder).read_text())
            self.images.positions = [tuple(position) for position in positions]
        else:  # files are dealt anew: with a new pass
            positions = json.loads((folder / "stream_0.json").read_text())
            next_epoch = 1 + max(epoch for epoch, _ in positions)
            self.images.positions = [(next_epoch, 0)] * len(self.images.positions)
            self.images_into_epoch = 0

    def _set_learning_rate(self) -> None:
        """Puts `--learning_rate`, which may be another than before the interruption, in the place of the loaded one."""
        scheduler = self.lr_scheduler.scheduler
        scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, scheduler.lr_lambdas):
            group["initial_lr"] = self.args.learning_rate
            group["lr"] = self.args.learning_rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _forget_metrics_after(self, step: int) -> None:
        """Drops entries of steps that will be taken again, and what was cut off in the middle."""
        path = self.args.output_dir / "metrics.jsonl"
        if self.accelerator.is_main_process:
            entries = [entry for entry in read_metrics(path) if entry["step"] <= step]
            with atomic_write(path) as partial:
                partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
