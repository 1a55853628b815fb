"""What the training scripts share: arguments, one loop over optimizer steps, checkpoints, logs."""

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from diffusers_adm.openai_flags import BETA_SCHEDULES, Flags, build_scheduler
from diffusers_adm.training.data import add_data_arguments


logger = get_logger(__name__)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all scripts share, in groups."""
    add_data_arguments(parser)

    group = parser.add_argument_group("architecture")
    group.add_argument("--model_channels", type=int, default=128)
    group.add_argument("--channel_mult", type=_numbers(float), default=(1, 2, 3, 4), help="For example 0.5,1,2.")
    group.add_argument("--layers_per_block", type=int, default=2)
    group.add_argument("--attention_resolutions", type=_numbers(int), default=(32, 16, 8), help="In pixels.")
    group.add_argument("--attention_head_dim", type=int, default=64)
    group.add_argument("--norm_num_groups", type=int, default=32)
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--pretrained_model_name_or_path", help="Model of the same architecture to start from.")

    group = parser.add_argument_group("diffusion")
    group.add_argument("--noise_schedule", choices=BETA_SCHEDULES, default="linear")
    group.add_argument("--num_train_timesteps", type=int, default=1000)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=int, default=64, help="Of one process, in one forward pass.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, required=True, help="Optimizer steps.")
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument("--lr_scheduler", default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument(
        "--max_grad_norm", type=float, default=None, help="Clip gradients to this norm; default: never."
    )
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, required=True)
    group.add_argument("--checkpointing_steps", type=int, default=5000)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", default=None, help='Folder of a checkpoint, or "latest".')
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--validation_steps", type=int, default=5000)
    group.add_argument("--report_to", default=None, help="A tracker of accelerate: tensorboard, wandb, ...")


def _numbers(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part)

    return parse


def build_noise_scheduler(
    args: argparse.Namespace, learn_sigma: bool = True, predict_xstart: bool = False
) -> DDPMScheduler:
    """
    The scheduler that is trained with, and saved beside the UNet.

    Raises:
        ValueError: If there are too few timesteps for the schedule.
    """
    flags = Flags(
        diffusion_steps=args.num_train_timesteps, noise_schedule=args.noise_schedule, predict_xstart=predict_xstart
    )
    return build_scheduler(flags, learn_sigma)


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The part of a model's config that UNet and classifier share."""
    return {
        "sample_size": args.resolution,
        "in_channels": args.in_channels,
        "model_channels": args.model_channels,
        "channel_mult": args.channel_mult,
        "layers_per_block": args.layers_per_block,
        "attention_resolutions": args.attention_resolutions,
        "attention_head_dim": args.attention_head_dim,
        "norm_num_groups": args.norm_num_groups,
        "dropout": args.dropout,
    }


def check_options(args: argparse.Namespace, num_images: int, num_processes: int) -> None:
    """Raises a ValueError if options are out of their range, or there are too few images for one batch a process."""
    for name in (
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "validation_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    if num_images < args.train_batch_size * num_processes:
        raise ValueError(
            f"{num_images} images do not fill a batch of {args.train_batch_size} on each of {num_processes} processes."
        )


def load_pretrained(model: ModelMixin, name_or_path: str) -> None:
    """
    Gives a model the weights of a saved one.

    Raises:
        ValueError: If the two differ in architecture.
    """
    pretrained = type(model).from_pretrained(name_or_path)
    # Through JSON, as the saved one's has come: it knows no tuples.
    ours, theirs = json.loads(model.to_json_string()), json.loads(pretrained.to_json_string())
    names = [name for name in ours if not name.startswith("_") and name != "dropout"]
    differing = [name for name in names if ours[name] != theirs[name]]
    if differing:
        pairs = ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in differing)
        raise ValueError(f"--pretrained_model_name_or_path {name_or_path} is of another architecture: {pairs}.")
    model.load_state_dict(pretrained.state_dict())


def save_whole(model: ModelMixin | DiffusionPipeline, folder: Path) -> None:
    """`save_pretrained` under another name, then renamed: whoever reads the folder finds all of it."""
    partial = folder.with_name("partial-" + folder.name)
    model.save_pretrained(partial)
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, which is removed last."""
    old = folder.with_name("old-" + folder.name)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def start(args: argparse.Namespace) -> Accelerator:
    """What a script does first: sets up the processes, then seeds them, before anything is drawn at random."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # An epoch's last batches do not make a step by themselves: its gradient would be too small.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=args.report_to,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed, device_specific=True)
    return accelerator


class Trainer:
    """
    Runs optimizer steps, and keeps what they need to go on after an interruption.

    Args:
        args: Parsed `add_training_arguments`.
        accelerator: Of `start`.
        model: What is trained.
        dataset: Its training images.
        ema_decay: Constant rate of the moving average of the weights; `None` keeps none.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: torch.nn.Module,
        dataset: Dataset,
        ema_decay: float | None = None,
    ):
        self.args = args
        self.accelerator = accelerator
        check_options(args, len(dataset), accelerator.num_processes)
        if args.resume_from_checkpoint is None and self._checkpoints():
            raise ValueError(
                f"--output_dir {args.output_dir} holds checkpoints: pass --resume_from_checkpoint latest, or another"
                " folder."
            )
        if args.pretrained_model_name_or_path:
            load_pretrained(model, args.pretrained_model_name_or_path)
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        # Each pass over the data draws a seed for its workers: from a generator of its own, or what the model draws would
        # depend on how often a run was resumed.
        self.worker_seeds = torch.Generator()
        loader = DataLoader(
            dataset,
            batch_size=args.train_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
            generator=self.worker_seeds,
        )
        self.model, self.optimizer, self.lr_scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, lr_scheduler, loader
        )
        self.ema = None
        if ema_decay is not None:
            # All three together make the rate constant, as ADM's is; EMAModel by itself ramps it up.
            self.ema = EMAModel(
                self.unwrapped_model.parameters(),
                decay=ema_decay,
                min_decay=ema_decay,
                update_after_step=-1,
                foreach=True,
            )
            self.ema.to(self.accelerator.device)
            if args.max_train_steps < 5 / (1 - ema_decay):
                logger.warning(
                    "An average of rate %g remembers the initial weights for %d steps; this run takes %d.",
                    ema_decay, round(5 / (1 - ema_decay)), args.max_train_steps,
                )  # fmt: skip
        self.global_step = 0
        self.epoch = 0
        self.batches_into_epoch = 0
        if self.accelerator.is_main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.report_to:
            self.accelerator.init_trackers("diffusers-adm", config={k: str(v) for k, v in vars(args).items()})
        if args.resume_from_checkpoint:
            self._resume(args.resume_from_checkpoint)

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        """The model without what accelerate wraps round it."""
        return self.accelerator.unwrap_model(self.model)

    def train(
        self,
        losses: Callable[[torch.nn.Module, dict], dict[str, torch.Tensor]],
        validate: Callable[[], None] | None = None,
    ) -> None:
        """
        Takes optimizer steps up to `max_train_steps`.

        Args:
            losses: Of the model and a batch, terms `(batch,)` or scalar to log; `"loss"` is minimised.
            validate: Called every `validation_steps` and at the end, on all processes, with the model in eval mode. It
                draws nothing from the global random state, which a resumed run would miss.
        """
        args, accelerator = self.args, self.accelerator
        sums: dict[str, torch.Tensor] = {}
        micro_batches, logged_at, logged_step = 0, time.monotonic(), self.global_step
        self.model.train()
        while self.global_step < args.max_train_steps:
            self.worker_seeds.manual_seed(
                args.seed + accelerator.num_processes * self.epoch + accelerator.process_index
            )
            self.loader.set_epoch(self.epoch)
            loader = self.loader
            if self.batches_into_epoch:
                loader = accelerator.skip_first_batches(self.loader, self.batches_into_epoch)
                loader.set_epoch(self.epoch)
            for batch in loader:
                with accelerator.accumulate(self.model):
                    terms = losses(self.model, batch)
                    accelerator.backward(terms["loss"].mean())
                    if accelerator.sync_gradients:
                        max_norm = float("inf") if args.max_grad_norm is None else args.max_grad_norm
                        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach().mean()
                micro_batches += 1
                self.batches_into_epoch += 1
                if not accelerator.sync_gradients:
                    continue
                # A step that fp16's loss scaling skipped changed nothing: neither the average nor the rate moves.
                if not accelerator.optimizer_step_was_skipped:
                    self.lr_scheduler.step()
                    if self.ema is not None:
                        self.ema.step(self.unwrapped_model.parameters())
                self.global_step += 1
                if self.global_step % args.logging_steps == 0:
                    means = {
                        name: accelerator.reduce(total, "mean").item() / micro_batches for name, total in sums.items()
                    }
                    images = (self.global_step - logged_step) * accelerator.gradient_accumulation_steps
                    images *= args.train_batch_size * accelerator.num_processes
                    means["grad_norm"] = grad_norm.item()
                    means["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
                    means["images_per_second"] = images / (time.monotonic() - logged_at)
                    self.log(means)
                    sums, micro_batches = {}, 0
                    logged_at, logged_step = time.monotonic(), self.global_step
                last = self.global_step == args.max_train_steps
                if last or self.global_step % args.checkpointing_steps == 0:
                    self.save_checkpoint()
                if validate is not None and not last and self.global_step % args.validation_steps == 0:
                    self._validate(validate)
                if last:
                    break
            else:
                self.epoch, self.batches_into_epoch = self.epoch + 1, 0
        # Outside the loop: a run that was stopped in its last validation does it again when it resumes.
        if validate is not None:
            self._validate(validate)
        accelerator.end_training()

    def _validate(self, validate: Callable[[], None]) -> None:
        self.model.eval()
        validate()
        self.model.train()
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def averaged_weights(self):
        """Puts the moving average in the place of the weights, for as long as the context lasts."""
        parameters = list(self.unwrapped_model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def log(self, values: dict[str, float]) -> None:
        """Appends to `metrics.jsonl`, prints, and passes on to the tracker."""
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            with open(self.args.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.global_step, **values}) + "\n")
            print(f"step {self.global_step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-N` under another name, renames it, and only then removes the oldest."""
        folder = self.args.output_dir / f"checkpoint-{self.global_step}"
        partial = folder.with_name("partial-" + folder.name)
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.accelerator.is_main_process:
            if self.ema is not None:
                names = [name for name, _ in self.unwrapped_model.named_parameters()]
                save_file(dict(zip(names, self.ema.shadow_params)), partial / "ema.safetensors")
            state = {
                "global_step": self.global_step,
                "epoch": self.epoch,
                "batches_into_epoch": self.batches_into_epoch,
            }
            (partial / "trainer_state.json").write_text(json.dumps(state))
            replace_folder(partial, folder)
            for old in self._checkpoints()[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        folders = self.args.output_dir.glob("checkpoint-*")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))

    def _resume(self, name: str) -> None:
        if name == "latest":
            checkpoints = self._checkpoints()
            if not checkpoints:
                self.accelerator.print(f"No checkpoint in {self.args.output_dir} yet: starting from the beginning.")
                return
            folder = checkpoints[-1]
        else:
            folder = Path(name)
            if not (folder / "trainer_state.json").is_file():
                raise ValueError(f"--resume_from_checkpoint {name}: no checkpoint is there.")
        state = json.loads((folder / "trainer_state.json").read_text())
        self.accelerator.load_state(str(folder))
        if self.ema is not None:
            averages = load_file(folder / "ema.safetensors", device=str(self.accelerator.device))
            for (name, _), shadow in zip(self.unwrapped_model.named_parameters(), self.ema.shadow_params):
                shadow.copy_(averages[name])
            self.ema.optimization_step = state["global_step"]
        self.global_step = state["global_step"]
        self.epoch = state["epoch"]
        self.batches_into_epoch = state["batches_into_epoch"]
        self.accelerator.print(f"Resumed from {folder} at step {self.global_step}.", flush=True)
