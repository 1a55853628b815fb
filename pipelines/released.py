"""Released checkpoints of any kind, by name."""

import os
from pathlib import Path

import torch

from diffusers_adm.checks import check_dtype
from diffusers_adm.hub.released_files import converted_folder
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.openai.released import released_checkpoint
from diffusers_adm.pipelines.pipeline_adm_upsample import ADMUpsamplePipeline
from diffusers_adm.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


LOADERS = {"unet": ClassifierGuidedPipeline, "upsampler": ADMUpsamplePipeline, "classifier": NoisyClassifier}


def name_of_released(model: str | os.PathLike) -> str | None:
    """Returns `NAME` if a model is given as `released:NAME`. Returns `None` for a folder or a Hub id."""
    prefix, _, name = str(model).partition(":")
    return name if prefix.lower() == "released" and name else None


def released_folder(name: str, kind: str) -> tuple[Path, str | None]:
    """
    Returns the folder of a converted checkpoint, and the subfolder of its network. The checkpoint is downloaded if it is not in the
    cache.

    Args:
        name: Short name or file name.
        kind: Expected kind: "unet", "upsampler" or "classifier".

    Raises:
        ValueError: If no checkpoint has this name, it is of another kind, it cannot be converted, its license is not accepted, or the
            downloaded file is not this checkpoint.
        OSError: If the checkpoint cannot be downloaded or written.
    """
    released = released_checkpoint(name)
    if released.kind != kind:
        raise ValueError(
            f"The released checkpoint {released.name} has the kind {released.kind}, but needed is: {kind}."
        )
    folder = converted_folder(released, LOADERS[released.kind].from_openai)
    return folder, None if released.kind == "classifier" else "unet"


def load_released(
    name: str,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    accept_license: bool = False,
) -> ClassifierGuidedPipeline | ADMUpsamplePipeline | NoisyClassifier:
    """
    Loads a released checkpoint with the class of its kind. The arguments are those of a pipeline's `from_released`.

    Args:
        name: Short name or file name.
        cache_dir: Folder of the cache.
        local_files_only: Whether to use only files in the cache, without a download.
        dtype: Data type of the weights. `None` means float32.
        accept_license: Whether the restrictions of the checkpoint's license are accepted.

    Raises:
        ValueError: If no checkpoint has this name, it cannot be converted, its license is not accepted, the downloaded file is not
            this checkpoint, or `dtype` is not a floating-point type.
        OSError: If the checkpoint cannot be downloaded or written.
    """
    check_dtype(dtype)
    released = released_checkpoint(name)
    cache = {"cache_dir": cache_dir, "local_files_only": local_files_only, "accept_license": accept_license}
    if released.kind == "classifier":
        folder = converted_folder(released, NoisyClassifier.from_openai, **cache)
        return NoisyClassifier.from_pretrained(folder, dtype=dtype)
    return LOADERS[released.kind].from_released(name, dtype=dtype, **cache)
