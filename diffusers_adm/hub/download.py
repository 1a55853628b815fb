"""Downloads of saved pipelines from the Hub, and checks of the index that names their classes."""

import importlib
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers_adm.betas import NoiseConfig, betas_from_config
from diffusers_adm.hub.saved_files import CARD_FILE, SAVED_CLASSES, card_pictures
from diffusers_adm.openai.files import check_is_saved_model
from diffusers_adm.saved_folders import loading, read_config, weight_files


class OtherPipelineError(ValueError):
    """Error of loading a pipeline that was saved by another class."""


def as_installed(config: dict, pipeline_class: type) -> None:
    """
    Rewrites a pipeline's index so that the classes of the installed package are loaded.

    Args:
        config: Content of `model_index.json`. An entry names a class, and a code file of the folder or a module of this package. The
            entry of the pipeline may name the class alone.
        pipeline_class: Class that loads the pipeline.

    Raises:
        OtherPipelineError: If the index belongs to a pipeline of another class.
    """
    name = config.get("_class_name")
    name = name[-1] if isinstance(name, (list, tuple)) and name else name
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
    Returns the absolute path of a pipeline's folder. A pipeline on the Hub is downloaded first.

    Args:
        name_or_path: Folder, or id of a repository on the Hub.
        options: Arguments of `from_pretrained`. Arguments of the download are removed from this dict.

    Raises:
        ValueError: If the path is a file, or is neither a folder nor a valid id.
        RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError: If the pipeline does not exist on the Hub.
        LocalEntryNotFoundError: If the pipeline is not in the cache and the Hub cannot be reached.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    download_options = {name: options.pop(name) for name in names if name in options}
    check_is_saved_model(name_or_path)
    if os.path.isdir(name_or_path):
        return os.path.abspath(name_or_path)
    repo_id, variant = str(name_or_path), options.get("variant")
    try:
        index = Path(hf_hub_download(repo_id, "model_index.json", **download_options))
    except LocalEntryNotFoundError as error:
        if "/" in repo_id:
            raise
        raise LocalEntryNotFoundError(
            f"There is no folder {repo_id!r}, and no repository of this name in the cache. Ids on the Hub look like 'owner/name'."
        ) from error
    # Pin the commit of the index, so that a concurrent push cannot mix two versions.
    download_options["revision"] = index.parent.name
    components = _components(read_config(index), options)
    configs = [f"{name}/{file}" for name in components for file in ("config.json", "scheduler_config.json")]
    weights = [f"{name}/{file}" for name in components for file in weight_files(variant)]
    patterns = [CARD_FILE, "model_index.json", *configs, *weights]
    folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **download_options))
    missing = [picture for picture in card_pictures(folder) if not (folder / picture).is_file()]
    if variant is not None:
        # A component without this variant loads its weights without a variant, as in all pipelines of diffusers.
        without = [name for name in components if not any(folder.glob(f"{name}/*.{variant}*"))]
        missing += [f"{name}/{file}" for name in without for file in weight_files(None)]
    if missing:
        snapshot_download(repo_id, allow_patterns=missing, **download_options)
    return str(folder)


def check_index(folder: Path, pipeline_class: type, given: dict) -> None:
    """
    Checks the index of a saved pipeline and the config of its scheduler. Models check their own files.

    Args:
        folder: Folder of the pipeline.
        pipeline_class: Class that loads the pipeline.
        given: Arguments of `from_pretrained`. Components among them are not loaded from the folder.

    Raises:
        OSError: If a file is missing or damaged.
        OtherPipelineError: If the index belongs to a pipeline of another class.
        ValueError: If a component is missing in the index, or the config does not describe a scheduler.
    """
    path = folder / "model_index.json"
    index = read_config(path)
    if "_class_name" not in index:
        raise ValueError(f"The file {str(path)!r} must describe a pipeline, but has no `_class_name`.")
    as_installed(index, pipeline_class)
    for name in {"unet", "scheduler", "classifier"} - given.keys():
        entry = index.get(name, [None, None])
        if entry == [None, None] and name == "classifier":
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            raise ValueError(
                f"The file {str(path)!r} must name the library and class of the {name}, but got {entry!r}."
            )
        if not (folder / name).is_dir():
            raise OSError(f"There is no folder {str(folder / name)!r}. Save or download the pipeline again.")
    if "scheduler" in given:
        return
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    if "Scheduler" not in str(config.get("_class_name")):
        raise ValueError(
            f"The file {str(path)!r} must describe a scheduler, but its `_class_name` is {config.get('_class_name')!r}."
        )
    with loading("The scheduler", str(path)):
        betas_from_config({**vars(NoiseConfig()), **config})


def _components(index: dict, given: dict) -> list[str]:
    """Returns the names of the components to download. Components that are given as arguments are left out."""
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and name != "_class_name" and entry[0] is not None and name not in given
    ]
