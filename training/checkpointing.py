"""Checkpoints of a run: writing them, removing old ones, and resuming from them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from diffusers_adm.atomic_files import flush_folder, partial_folder, remove_folder, replace_folder
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.training.averages import MovingAverages
from diffusers_adm.training.checkpoint_folders import checkpoint_step, list_checkpoints
from diffusers_adm.training.checkpoint_parts import (
    check_parts,
    load_prepared,
    load_sampler,
    read_progress,
    save_sampler,
)
from diffusers_adm.training.configuration import as_yaml, contradictions
from diffusers_adm.training.options import TrainingOptions
from diffusers_adm.training.output_options import OutputOptions
from diffusers_adm.training.stopping import StopRequest


logger = get_logger(__name__)

MODELS = ("pipeline", "classifier")
VALIDATED = "validated"  # empty file that marks a checkpoint whose step has been validated


@dataclass
class TrainingState:
    """
    State of a run that a checkpoint stores in addition to the state that accelerate stores.

    Args:
        images: Training images. A stream has a position, which is stored.
        averages: Moving averages of the weights.
        sampler: Timestep sampler.
        global_step: Number of optimizer steps, including skipped ones.
        validated_step: Number of steps at the last validation that was completed.
        skipped_steps: Number of steps that were skipped because fp16 overflowed.
        epoch: Number of complete passes over the images.
        images_into_epoch: Number of images seen in the current pass.
    """

    images: LabelledImages | StreamedImages
    averages: MovingAverages
    sampler: torch.nn.Module | None = None
    global_step: int = 0
    validated_step: int = 0
    skipped_steps: int = 0
    epoch: int = 0
    images_into_epoch: int = 0


class Checkpointer:
    """
    Writes the checkpoints of a run, removes old ones, and restores the state from them.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run.
        stop: Stop request, whose communication between processes is used here too.

    Attributes:
        saved_step: Number of steps at the last checkpoint in the output folder. 0 if there is none.
        continues_folder: Whether the run continues that of the output folder.
    """

    def __init__(self, options: TrainingOptions, accelerator: Accelerator, stop: StopRequest):
        self.options = options
        self.output_dir = options.output.output_dir
        self.accelerator = accelerator
        self.stop = stop
        self.saved_step = 0
        self.continues_folder = False

    def check(self, folder: Path, images: LabelledImages | StreamedImages) -> None:
        """
        Checks that a checkpoint belongs to this run. Warns if the resumed run will differ from an uninterrupted one.

        Args:
            folder: Folder of the checkpoint.
            images: Training images.

        Raises:
            ValueError: If the checkpoint is incomplete or damaged, holds objects that might run code, or is from a run with
                other options or classes.
        """
        check_parts(folder, scaled=self.accelerator.scaler is not None)
        differing = contradictions(self.options, (folder / "options.yaml").read_text())
        if differing:
            raise ValueError(f"{folder} was trained with other options: {', '.join(differing)}.")
        saved = read_progress(folder)
        step, last = saved["global_step"], self.options.optimisation.max_train_steps
        if step > last:
            raise ValueError(
                f"--max_train_steps must be at least {step}, the step of {folder}, but got {last}. To save the model of this step, pass"
                f" {step}."
            )
        if "class_names" in saved:
            check_class_names(folder, saved["class_names"], images.class_names)
        now = {"num_processes": self.accelerator.num_processes, "num_images": images.num_images}
        for name, value in now.items():
            if saved[name] != value:
                logger.warning(
                    "%s was written with %s %s, and this run has %s. The order of the images, random numbers or the number of"
                    " images per step differ from here on.",
                    folder, name, saved[name], value,
                )  # fmt: skip

    def load(self, folder: Path, state: TrainingState) -> None:
        """
        Restores the state of a run, and of all objects that accelerate has prepared.

        Raises:
            ValueError: If a file of the checkpoint is from another run.
        """
        saved = read_progress(folder)
        load_prepared(self.accelerator, folder)
        load_sampler(state.sampler, folder)
        state.averages.load(folder, saved["averaged_steps"])
        state.global_step = saved["global_step"]
        state.validated_step = state.global_step if (folder / VALIDATED).exists() else 0
        state.skipped_steps = saved["global_step"] - saved["averaged_steps"]
        state.epoch = saved["epoch"]
        state.images_into_epoch = saved["images_into_epoch"]
        if isinstance(state.images, StreamedImages):
            self._load_positions(folder, state, saved["num_processes"])
        self.continues_folder = folder.resolve().parent == self.output_dir.resolve()
        if (self.output_dir / f"checkpoint-{state.global_step}").is_dir():  # it may be a copy, or in another folder
            self.saved_step = state.global_step
        self.accelerator.print(f"Resumed from {folder} at step {state.global_step}.", flush=True)

    def _load_positions(self, folder: Path, state: TrainingState, num_processes: int) -> None:
        if num_processes == self.accelerator.num_processes:
            positions = json.loads(self._positions_file(folder).read_text())
            state.images.positions = [tuple(position) for position in positions]
        else:  # the files are divided in another way, so a new pass begins
            positions = json.loads((folder / "stream_0.json").read_text())
            next_epoch = 1 + max(epoch for epoch, _ in positions)
            state.images.positions = [(next_epoch, 0)] * len(state.images.positions)
            state.images_into_epoch = 0

    def save(self, state: TrainingState, must_succeed: bool = False) -> None:
        """
        Writes `checkpoint-N` under a temporary name, flushes and renames it, and then removes old checkpoints.

        Args:
            state: State of the run.
            must_succeed: Whether to raise a failure. Otherwise it is logged, because the disk may have space at the next save.
        """
        folder = self.output_dir / f"checkpoint-{state.global_step}"
        partial = partial_folder(folder)
        try:
            self._on_all(lambda: self._write(state, partial))
            # Flushed after all processes have written, because files in the folder are renamed until then.
            self._on_all(lambda: flush_folder(partial))
            self._on_all(lambda: self._put_in_place(partial, folder))
        except Exception as error:  # safetensors, torch and the system raise errors of many types
            # The error of torch does not say that the disk is full.
            free = shutil.disk_usage(self.output_dir).free / 2**20
            failure = f"Cannot write {folder} while {free:.1f} MiB are free: {error}. {self.describe_last()}"
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            if must_succeed and isinstance(error, (OSError, RuntimeError, SafetensorError)):
                raise OSError(failure) from error
            if must_succeed:
                raise
            logger.error(failure)
            return
        self.saved_step = state.global_step

    def _on_all(self, task: Callable[[], None]) -> None:
        """Runs a task on all processes, and waits for all. If it fails on one process, all processes raise."""
        failure = None
        try:
            task()
        except Exception as error:
            failure = error
        if self.stop.on_any_process(failure is not None):
            raise failure or RuntimeError("another process could not write its files")

    def _write(self, state: TrainingState, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if isinstance(state.images, StreamedImages):
            self._positions_file(folder).write_text(json.dumps(state.images.positions))
        if not self.accelerator.is_main_process:
            return
        save_sampler(state.sampler, folder)
        state.averages.save(folder)
        saved = {
            "global_step": state.global_step,
            "epoch": state.epoch,
            "images_into_epoch": state.images_into_epoch,
            "num_processes": self.accelerator.num_processes,
            "num_images": state.images.num_images,
            "class_names": state.images.class_names,
            "averaged_steps": state.global_step - state.skipped_steps,
        }
        (folder / "options.yaml").write_text(as_yaml(self.options))
        (folder / "trainer_state.json").write_text(json.dumps(saved))

    def _put_in_place(self, partial: Path, folder: Path) -> None:
        if self.accelerator.is_main_process:
            replace_folder(partial, folder)
            output = self.options.output
            remove_old_checkpoints(self.output_dir, output.checkpoints_total_limit, output.keep_every)

    def mark_validated(self, state: TrainingState) -> None:
        """Records that the step has been validated, so that a resumed run does not validate it again."""
        state.validated_step = state.global_step
        if self.accelerator.is_main_process and self.saved_step == state.global_step:
            (self.output_dir / f"checkpoint-{state.global_step}" / VALIDATED).touch()

    def _positions_file(self, folder: Path) -> Path:
        """Returns the file that stores the position of this process in its stream."""
        return folder / f"stream_{self.accelerator.process_index}.json"

    def describe_last(self) -> str:
        """Returns a sentence that names the last checkpoint."""
        checkpoints = list_checkpoints(self.output_dir)
        return f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."


def find_checkpoint(output: OutputOptions, accelerator: Accelerator) -> Path | None:
    """
    Returns the checkpoint to resume from, or `None` for a new run.

    Args:
        output: Options of the run's files.
        accelerator: Accelerator of the run.

    Raises:
        ValueError: If the checkpoint does not exist, or the output folder holds checkpoints or models of another run.
    """
    name, output_dir = output.resume_from_checkpoint, output.output_dir
    # All processes use the list of the main process. A process with its own disk would find no checkpoint and silently begin a new
    # run.
    [checkpoints] = broadcast_object_list([list_checkpoints(output_dir)])
    if name == "latest" and checkpoints:
        return checkpoints[-1]
    folder = None if name in (None, "latest") else Path(name)
    if folder is not None and not (folder / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint must be the folder of a checkpoint or latest, but got {name}.")
    if folder is not None and folder.resolve().parent == output_dir.resolve():
        step = read_progress(folder)["global_step"]
        later = [path.name for path in checkpoints if checkpoint_step(path) > step]
        if later:
            raise ValueError(
                f"--output_dir {output_dir} holds later checkpoints than {folder.name}: {', '.join(later)}. Move them away, or pass"
                " another --output_dir."
            )
        return folder
    check_unused(output_dir, checkpoints)
    if name == "latest":
        accelerator.print(f"There is no checkpoint in {output_dir} yet, so the run starts from the beginning.")
    return folder


def check_unused(output_dir: Path, checkpoints: list[Path]) -> None:
    """Raises a `ValueError` if an output folder holds checkpoints or models, which a new run would replace."""
    if checkpoints:
        raise ValueError(
            f"--output_dir {output_dir} holds {checkpoints[0].name} of an earlier run. Pass --resume_from_checkpoint latest, or another"
            " folder."
        )
    models = [model for model in MODELS if (output_dir / model).exists()]
    if models:
        raise ValueError(
            f"--output_dir {output_dir} holds {models[0]} of an earlier run, but no checkpoint. Move it away, or pass another folder."
        )


def check_class_names(folder: Path, saved: list[str] | None, now: list[str] | None) -> None:
    """Raises a `ValueError` if the classes of a checkpoint and of the dataset differ, or are in a different order."""
    if saved == now:
        return
    saved, now = saved or [], now or []
    missing, added = [name for name in saved if name not in now], [name for name in now if name not in saved]
    changes = [f"without {missing[:5]}"] * bool(missing) + [f"with new {added[:5]}"] * bool(added)
    raise ValueError(
        f"{folder} was trained with other classes. The dataset is now {' and '.join(changes) or 'in another order'}."
        " Restore the names of the classes, or begin a new run in another --output_dir."
    )


def remove_old_checkpoints(folder: Path, limit: int, keep_every: int | None) -> None:
    """Removes old checkpoints. The latest `limit` checkpoints and those at multiples of `keep_every` are kept."""
    temporary = [
        path for path in list_checkpoints(folder) if keep_every is None or checkpoint_step(path) % keep_every != 0
    ]
    for path in temporary[:-limit]:
        remove_folder(path)
