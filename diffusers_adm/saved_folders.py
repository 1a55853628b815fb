"""Checks of the files of saved models and pipelines. They come before diffusers reads the files, so that errors name a file."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open


WEIGHTS = "diffusion_pytorch_model"


def read_config(path: Path) -> dict:
    """
    Reads a config file of a saved model or pipeline.

    Raises:
        OSError: If the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        folder, advice = path.parent, "Save or download it again."
        if (folder / "model_index.json").is_file():
            advice = "It holds a pipeline. Pass the name of one of its models as `subfolder`, such as 'unet'."
        elif path.name == "model_index.json" and (folder / "config.json").is_file():
            advice = "It holds a model, not a pipeline."
        elif not folder.is_dir() and (folder.parent / "model_index.json").is_file():
            advice = f"The pipeline {str(folder.parent)!r} has no {folder.name}."
        elif (trained := trained_in(folder)) is not None:
            advice = f"It is the folder of a training run. Pass {str(trained)!r}."
        raise OSError(f"The folder {str(folder)!r} has no {path.name}. {advice}")
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"The file {str(path)!r} must hold a JSON object, but is damaged. Save or download it again."
        ) from error
    return config


def trained_in(folder: Path) -> Path | None:
    """Returns the folder of the pipeline or classifier that a training run has saved in its folder, or `None`."""
    for name, file in (("pipeline", "model_index.json"), ("classifier", "config.json")):
        if (folder / name / file).is_file():
            return folder / name
    return None


def weight_files(variant: str | None) -> list[str]:
    """Returns patterns for the weight files that `save_pretrained` writes: one file, or several shards and their index."""
    suffix = "" if variant is None else f".{variant}"
    return [
        f"{WEIGHTS}{suffix}.safetensors",
        f"{WEIGHTS}{suffix}-*-of-*.safetensors",
        f"{WEIGHTS}.safetensors.index{suffix}.json",
    ]


def saved_variants(folder: Path) -> list[str]:
    """Returns the variants of the weight files that `save_pretrained` wrote in a folder."""
    name = re.compile(rf"{WEIGHTS}\.(\w[\w.-]*?)(?:-\d+-of-\d+)?\.safetensors")
    return sorted({match[1] for path in folder.glob(f"{WEIGHTS}.*") if (match := name.fullmatch(path.name))})


def check_safe_serialization(safe_serialization: bool) -> None:
    """Raises a ValueError if weights are to be saved in files that can carry code."""
    if not safe_serialization:
        raise ValueError(
            f"`safe_serialization` must be True, because other files than safetensors can carry code, but got {safe_serialization!r}."
        )


def check_weights(folder: Path, variant: str | None) -> None:
    """
    Checks that the weight files of a saved model can be opened. The values of the weights are not read.

    Args:
        folder: Folder of the model.
        variant: Part of the weight files' names, such as `"fp16"`.

    Raises:
        OSError: If there are no weights, or a file is damaged.
    """
    files = [path for pattern in weight_files(variant) for path in sorted(folder.glob(pattern)) if path.is_file()]
    # Without a variant, diffusers also loads older files.
    older = [] if variant is not None else [path for path in folder.glob(f"{WEIGHTS}.bin*") if path.is_file()]
    if not files and not older:
        variants = " or ".join(f"variant={name!r}" for name in saved_variants(folder))
        advice = f"Pass {variants}" if variants else "Save or download it again"
        raise OSError(f"The folder {str(folder)!r} has no {weight_files(variant)[0]}. {advice}.")
    for path in files:
        if path.suffix == ".json":
            read_config(path)
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:  # a damaged file raises errors of several types
            raise OSError(
                f"The file {str(path)!r} is damaged, incomplete, or only a pointer of Git LFS. Save or download it again."
            ) from error


@contextlib.contextmanager
def loading(class_name: str, place: str) -> Iterator[None]:
    """
    Turns errors of loading into a `ValueError` that says in one line what cannot be loaded. Errors of files, of the Hub and of
    memory are raised unchanged.

    Args:
        class_name: Name of the class of the model or pipeline.
        place: Folder or id on the Hub.

    Raises:
        ValueError: If another error occurs, for example because a config does not describe a model.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The advice of diffusers for weights of wrong shapes is left out, because it would leave the weights uninitialised.
        cause = " ".join(str(error).split()).split(" If you want to instead")[0]
        raise ValueError(f"{class_name} cannot be loaded from {place!r}: {cause}") from error
