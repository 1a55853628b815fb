"""Files of the original code's checkpoints."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from diffusers_adm.openai.released import find_released


Checkpoint = str | os.PathLike | Mapping[str, torch.Tensor]


def read_state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a checkpoint. Those of a file are mapped into memory and read when they are used. Code in a file
    is not run.

    Args:
        checkpoint: Path of a file that `torch.save` wrote, or a state dict.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but tensors by name.
    """
    if isinstance(checkpoint, Mapping):
        source, content = "The state dict", checkpoint
    else:
        path = Path(checkpoint)
        source, content = f"The file {str(path)!r}", _load_file(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no state dict (tensors by name), but {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{source} holds {kind} under {name!r}; only floating-point tensors by name are allowed.")
    return {name: tensor.detach() for name, tensor in content.items()}


def _load_file(path: Path) -> object:
    if not path.is_file():
        released = find_released(path)
        advice = f" It is to be had at {released.url}" if released else ""
        raise ValueError(f"The file {str(path)!r} does not exist.{advice}")
    try:
        # Only the zip format, which torch has written since 1.6, can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file raises errors of a dozen types
        raise ValueError(
            f"The file {str(path)!r} cannot be read as a checkpoint of tensors: it is damaged or incomplete, or holds code"
            " or objects, which are not loaded."
        ) from error
