"""Loading of a model, which refuses missing weights, and casts of its weights."""

import inspect
import os
from pathlib import Path
from typing import Self

import torch

from diffusers_adm.checks import check_types
from diffusers_adm.openai.files import check_is_saved_model
from diffusers_adm.saved_folders import check_weights, loading, read_config


# Options that models saved by earlier versions of this package lack.
ADDED_OPTIONS = (
    "timestep_scale",
    "preconditioning",
    "sigma_data",
    "sigma_min",
    "sigma_max",
    "num_train_timesteps",
    "beta_schedule",
    "id2label",
)


class CompleteWeightsMixin:
    """Mixin that refuses to load missing weights. It must come before `ModelMixin` among the base classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self | tuple[Self, dict]:
        """
        Loads a saved model.

        Args:
            pretrained_model_name_or_path: Folder, or id of a repository on the Hub.
            kwargs: Arguments of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: If a file is given instead of a folder, the folder holds another model, or weights are missing or have wrong
                shapes, also with `ignore_mismatched_sizes=True`. diffusers itself would leave such weights uninitialised.
            OSError: If a file is missing or damaged.
        """
        check_is_saved_model(pretrained_model_name_or_path)
        if os.path.isdir(pretrained_model_name_or_path):
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            check_config_file(folder / "config.json", cls)
            check_weights(folder, kwargs.get("variant"))
        with_info = kwargs.pop("output_loading_info", False)
        with loading(cls.__name__, str(pretrained_model_name_or_path)):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"The weights of {cls.__name__} in {str(pretrained_model_name_or_path)!r} are incomplete: {len(missing)} of"
                f" {len(model.state_dict())} tensors are missing, such as {', '.join(missing[:3])}. Save or download them again."
            )
        if info["mismatched_keys"]:
            name, saved, needed = info["mismatched_keys"][0]
            raise ValueError(
                f"The weights of {cls.__name__} in {str(pretrained_model_name_or_path)!r} must have the shapes of the model, but {name}"
                f" is {tuple(saved)} instead of {tuple(needed)}, and would be left uninitialised. To train the model for other classes,"
                " channels or sizes, pass --pretrained_model_name_or_path to a training script."
            )
        return (model, info) if with_info else model


def check_config_file(path: Path, model_class: type) -> None:
    """
    Checks that a config file describes a model of a class.

    Args:
        path: File that `save_pretrained` wrote.
        model_class: Class of the model.

    Raises:
        OSError: If the file is missing or damaged.
        ValueError: If it describes a model of another class, or an entry is of a wrong type.
    """
    config = read_config(path)
    name, known = config.get("_class_name"), [base.__name__ for base in model_class.__mro__]
    required = inspect.signature(model_class.__init__).parameters.keys() - {"self", *ADDED_OPTIONS}
    # A derived class has another name, but all options of the class.
    if name not in known and not required <= config.keys():
        raise ValueError(
            f"The file {str(path)!r} must describe {model_class.__name__}, but its `_class_name` is {name!r}. Load it with that class."
        )
    try:
        check_types(model_class.__init__, config)
    except ValueError as error:
        raise ValueError(f"The file {str(path)!r} has an invalid entry: {error}") from error


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """
    Casts the weights one after the other. Narrower weights are written into the memory of the old ones, so that casting a large
    checkpoint needs no additional memory. If the weights are a file that is mapped into memory, the file does not change.

    Args:
        model: Model whose weights are cast.
        dtype: Data type of the weights afterwards.

    Raises:
        ValueError: If a finite weight is too large for the data type. The weights before it are cast already.
    """
    for name, parameter in model.named_parameters():
        old = parameter.data
        new = old.to(dtype)
        is_lost = old.isfinite() & ~new.isfinite()
        if is_lost.any():
            raise ValueError(
                f"`dtype` must hold all weights, but {name} has {old[is_lost][0]:g}, and {dtype} ends at {torch.finfo(dtype).max:g}."
                " Choose bfloat16 or float32."
            )
        if new.element_size() < old.element_size():
            place = old.flatten().view(dtype)[: old.numel()].view(old.shape)
            new = place.copy_(new)
        parameter.data = new
