"""Files of a checkpoint: the list of required files, and readers that run no code from a file."""

import json
import operator
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state
from accelerate.utils import load as load_weights_only
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_adm.training.configuration import read_table


CHECKPOINT_FILES = ("model.safetensors", "optimizer.bin", "scheduler.bin", "options.yaml", "trainer_state.json")
COUNTS = ("global_step", "averaged_steps", "epoch", "images_into_epoch", "num_processes")
SAMPLER_FILE = "timestep_sampler.safetensors"
PICKLES = (".bin", ".pkl", ".pt")
KEYS = {
    "optimizer.bin": ("state", "param_groups"),
    "scheduler.bin": ("base_lrs", "last_epoch", "lr_lambdas"),
    "options.yaml": ("output_dir",),
    "trainer_state.json": (*COUNTS, "num_images"),
}
OTHER_CHECKPOINT = "Remove this checkpoint to resume from an earlier one, or name another by --resume_from_checkpoint."


def check_parts(folder: Path, scaled: bool) -> None:
    """
    Checks that all files of a checkpoint exist and can be read. It changes no state, and runs no code from a file.

    Args:
        folder: Folder of the checkpoint.
        scaled: Whether the loss is scaled, which fp16 needs.

    Raises:
        ValueError: If a file is missing or damaged, or holds objects that might run code.
    """
    require(folder, CHECKPOINT_FILES)
    progress = read_progress(folder)
    names = [f"random_states_{process}.pkl" for process in range(progress["num_processes"])]
    if progress["num_images"] is None:  # the images are a stream
        names += [f"stream_{process}.json" for process in range(progress["num_processes"])]
    require(folder, names)
    if scaled:
        names.append("scaler.pt")
        if not (folder / "scaler.pt").is_file():
            raise ValueError(
                f"{folder} has no scaler.pt, which --mixed_precision fp16 requires. Pass the --mixed_precision of the interrupted"
                f" run. {OTHER_CHECKPOINT}"
            )
    for name in (*CHECKPOINT_FILES, *names):
        read_part(folder / name)


def require(folder: Path, names: Collection[str]) -> None:
    """Raises a `ValueError` if a checkpoint lacks any of the named files. The message lists all missing files."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not complete, because these files are missing: {', '.join(missing)}. {OTHER_CHECKPOINT}"
        )


def read_progress(folder: Path) -> dict[str, Any]:
    """
    Reads how many steps, passes and images a run had completed.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    require(folder, ["trainer_state.json"])
    return read_part(folder / "trainer_state.json")


def read_part(path: Path) -> Any:
    """
    Reads a file of a checkpoint.

    Returns:
        Content of the file. For safetensors, it is the list of the names of the tensors.

    Raises:
        ValueError: If the file is damaged, or is a pickle that holds more than tensors, arrays and numbers.
    """
    try:
        content = READERS[path.suffix](path)
        _check_content(path.name, content)
    except Exception as error:  # pickle, torch, safetensors, json and yaml raise errors of many types
        fault = "damaged, or holds code instead of tensors and numbers" if path.suffix in PICKLES else "damaged"
        raise ValueError(f"{path} is {fault}. {OTHER_CHECKPOINT}") from error
    return content


def read_tensors(path: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a file of a checkpoint.

    Args:
        path: Path of the file.
        like: Tensors of the run. Those of the file must have the same names and shapes.

    Raises:
        ValueError: If the file is missing or damaged, or its tensors have other names or shapes.
    """
    require(path.parent, [path.name])
    read_part(path)
    tensors = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    shapes = {name: tensor.shape for name, tensor in like.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise ValueError(
            f"{path} must hold tensors with the names and shapes of this run, but they differ. {OTHER_CHECKPOINT}"
        )
    return tensors


def load_prepared(accelerator: Accelerator, folder: Path) -> None:
    """
    Restores the model, optimizer, learning rate schedule and random states.

    `Accelerator.load_state` is not used, because it also loads pickles that can run code.

    Raises:
        ValueError: If the checkpoint is from another run.
    """
    try:
        load_accelerator_state(
            str(folder),
            accelerator._models,
            accelerator._optimizers,
            accelerator._schedulers,
            [],  # no loaders: the trainer restores the position in the data
            accelerator.process_index,
            accelerator.scaler,
        )
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} does not fit this run: {error}") from error


def save_sampler(sampler: torch.nn.Module | None, folder: Path) -> None:
    """Writes the state of the module that draws timesteps, if it has any."""
    tensors = {} if sampler is None else sampler.state_dict()
    if tensors:
        save_file(tensors, folder / SAMPLER_FILE)


def load_sampler(sampler: torch.nn.Module | None, folder: Path) -> None:
    """
    Restores the state of the module that draws timesteps.

    Raises:
        ValueError: If the file is missing, damaged or from another run.
    """
    tensors = {} if sampler is None else sampler.state_dict()
    if tensors:
        sampler.load_state_dict(read_tensors(folder / SAMPLER_FILE, like=tensors))


def _read_pickle(path: Path) -> Any:
    return load_weights_only(path, map_location="cpu", weights_only=True, mmap=True)


def _names_of_tensors(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: read_table(path.read_text(), path.name),
    ".safetensors": _names_of_tensors,
    **dict.fromkeys(PICKLES, _read_pickle),
}


def _check_content(name: str, content: Any) -> None:
    """Raises an error of any type if a file lacks a value that a resumed run reads."""
    for key in KEYS.get(name, ()):
        content[key]
    if name == "trainer_state.json":
        for key in COUNTS:
            operator.index(content[key])
    if name.startswith("stream_"):
        content[0]  # position of the first worker, which every stream has
        for epoch, batch in content:
            operator.index(epoch)
            operator.index(batch)
    if name.startswith("random_states_"):  # accelerate ignores damaged states silently
        random.Random().setstate(content["random_state"])
        np.random.RandomState().set_state(content["numpy_random_seed"])
        torch.Generator().set_state(content["torch_manual_seed"])
