"""Files of the original code's checkpoints."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffusers_adm.openai.released import find_released


# Tensor that every model of the original code has.
_FIRST_TENSOR = "time_embed.0.weight"

Checkpoint = str | os.PathLike | Mapping[str, torch.Tensor]


def read_state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of a checkpoint. The tensors of a file are mapped into memory and read when they are used. Code in a file is
    never run.

    Args:
        checkpoint: Path of a file that `torch.save` wrote, or a state dict. The tensors may be under a key, such as
            `"state_dict"`, and their names may have a prefix, such as `module.`.

    Raises:
        ValueError: If the file is missing or damaged, or holds other values than tensors by name, or holds several models.
    """
    if isinstance(checkpoint, Mapping):
        source, content = "The state dict", checkpoint
    else:
        path = Path(checkpoint)
        source, content = f"The file {str(path)!r}", _load_file(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} must hold a state dict (tensors by name), but holds {type(content).__name__}.")
    content = _unwrap(content, source)
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"{source} must only hold floating-point tensors by name, but holds {kind} under {name!r}."
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def check_is_saved_model(name_or_path: str | os.PathLike) -> None:
    """
    Checks that the argument of `from_pretrained` can be a saved model.

    Raises:
        ValueError: If it is a file, such as a checkpoint of the original code, or neither a folder nor a valid id.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise ValueError(f"A saved model must be a folder or an id on the Hub, but got {name_or_path!r}.")
    path = Path(name_or_path)
    if path.is_file() and path.suffix != ".json":
        raise ValueError(
            f"A saved model must be a folder or an id on the Hub, but {str(path)!r} is a file. Convert a checkpoint of the original"
            f" code first: run `diffusers-adm convert --unet {path} --output DIR` for a UNet, which is then in DIR/unet, or"
            f" `diffusers-adm convert --classifier {path} --output DIR` for a classifier."
        )
    if not path.exists():
        try:
            validate_repo_id(os.fspath(name_or_path))
        except HFValidationError as error:
            raise ValueError(
                f"There is no folder {str(name_or_path)!r}. Ids on the Hub look like 'owner/name'."
            ) from error


def _models_in(content: Mapping, place: str) -> dict[str, Mapping]:
    """Returns the models of the original code in a mapping, by their places. Prefixes of names are removed."""
    models = {}
    for name in content:
        if name == _FIRST_TENSOR:
            models[place or "no prefix"] = content
        elif isinstance(name, str) and name.endswith(f".{_FIRST_TENSOR}"):
            prefix = name.removesuffix(_FIRST_TENSOR)
            own = [other for other in content if isinstance(other, str) and other.startswith(prefix)]
            models[f"{place} prefix {prefix!r}".strip()] = {
                other.removeprefix(prefix): content[other] for other in own
            }
    return models


def _unwrap(content: Mapping, source: str) -> Mapping:
    """
    Returns the tensors of the only model in a mapping. They may be under a key, or have a common prefix in their names. A mapping
    without a model of the original code is returned unchanged.

    Raises:
        ValueError: If there are several models.
    """
    models = _models_in(content, "")
    for key, part in content.items():
        if isinstance(part, Mapping):
            models |= _models_in(part, f"key {key!r}")
    if len(models) > 1:
        raise ValueError(
            f"{source} must hold one model, but holds {len(models)} ({'; '.join(models)}). Pass the tensors of one of them as a"
            " state dict, or save them in another file."
        )
    return next(iter(models.values()), content)


def _load_file(path: Path) -> object:
    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} must be a file of the original code, but is a folder. Saved models need no conversion."
        )
    if not path.is_file():
        released = find_released(path)
        advice = f" Download it from {released.url}" if released else ""
        raise ValueError(f"The file {str(path)!r} does not exist.{advice}")
    try:
        # Only the zip format, which torch has written since version 1.6, can be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file raises errors of many types
        raise ValueError(
            f"The file {str(path)!r} must be a checkpoint of tensors, but it is damaged, incomplete, or holds code or objects,"
            " which are never loaded."
        ) from error
