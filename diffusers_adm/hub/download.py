"""Downloads of saved pipelines from the Hub, and the index that names their classes."""

import importlib
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError

from diffusers_adm.hub.saved_files import CARD_FILE, SAVED_CLASSES, card_pictures
from diffusers_adm.openai.files import check_is_saved_model


class OtherPipelineError(ValueError):
    """Saved pipeline of another class than the one that loads it."""


def as_installed(config: dict, pipeline_class: type) -> None:
    """
    Rewrites a pipeline's index so that the classes of the installed package are loaded.

    Args:
        config: Content of `model_index.json`. It names classes with a file of the folder, with a module of this package,
            or with neither.
        pipeline_class: Class that loads the pipeline.

    Raises:
        OtherPipelineError: If the index is that of another pipeline.
    """
    name = config.get("_class_name")
    name = name[1] if isinstance(name, (list, tuple)) else name
    if name is not None:
        known = [base.__name__ for base in pipeline_class.__mro__ if issubclass(base, DiffusionPipeline)]
        if name not in known:
            raise OtherPipelineError(f"This is a saved {name}, not a saved {pipeline_class.__name__}.")
        config["_class_name"] = name
    models = importlib.import_module("diffusers_adm.models")
    for component, entry in config.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[1] in SAVED_CLASSES:
            config[component] = [getattr(models, entry[1]).__module__, entry[1]]


def download(name_or_path: str | os.PathLike, options: dict) -> str:
    """
    Returns the absolute path of a pipeline's folder: the given one, or the one that a repository was downloaded to.

    Args:
        name_or_path: Folder, or id of a repository.
        options: Arguments of `from_pretrained`. Those of the download are taken out.

    Raises:
        ValueError: If the path is that of a file, or is neither that of a folder nor an id.
        RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError: If there is no such pipeline on the Hub.
        LocalEntryNotFoundError: If the pipeline is not in the cache and the Hub cannot be reached.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    download_options = {name: options.pop(name) for name in names if name in options}
    if os.path.isdir(name_or_path):
        return os.path.abspath(name_or_path)
    check_is_saved_model(name_or_path)
    repo_id, variant = str(name_or_path), options.get("variant")
    try:
        index = Path(hf_hub_download(repo_id, "model_index.json", **download_options))
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {repo_id!r}, and it cannot be an id on the Hub, which looks like 'owner/name'."
        ) from error
    # Pin the commit of the index, so that a concurrent push cannot mix two versions.
    download_options["revision"] = index.parent.name
    components = _components(json.loads(index.read_text(encoding="utf-8")), options)
    configs = [f"{name}/{file}" for name in components for file in ("config.json", "scheduler_config.json")]
    weights = [f"{name}/{file}" for name in components for file in _weight_files(variant)]
    patterns = [CARD_FILE, "model_index.json", *configs, *weights]
    folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **download_options))
    missing = [picture for picture in card_pictures(folder) if not (folder / picture).is_file()]
    if variant is not None:
        # A component without this variant loads its main weights, as in all pipelines of diffusers.
        without = [name for name in components if not any(folder.glob(f"{name}/*.{variant}*"))]
        missing += [f"{name}/{file}" for name in without for file in _weight_files(None)]
    if missing:
        snapshot_download(repo_id, allow_patterns=missing, **download_options)
    return str(folder)


def _components(index: dict, given: dict) -> list[str]:
    """Returns the components to download. Other folders of the repository and components that are given are left out."""
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and name != "_class_name" and entry[0] is not None and name not in given
    ]


def _weight_files(variant: str | None) -> list[str]:
    """Returns patterns of the files that `save_pretrained` writes weights to, in one part or several."""
    stem, suffix = "diffusion_pytorch_model", "" if variant is None else f".{variant}"
    return [
        f"{stem}{suffix}.safetensors",
        f"{stem}{suffix}-*-of-*.safetensors",
        f"{stem}.safetensors.index{suffix}.json",
    ]
