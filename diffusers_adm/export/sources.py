"""Loading of networks to export: from folders, the Hub, and released checkpoints."""

from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from diffusers_adm import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.hub.saved_files import CARD_FILE, check_variant
from diffusers_adm.openai.files import check_is_saved_model
from diffusers_adm.openai.released import guiding_classifier, released_checkpoint
from diffusers_adm.pipelines.released import name_of_released, released_folder
from diffusers_adm.saved_folders import read_config, weight_files
from diffusers_adm.shipped import name_or_folder


CLASSES = {cls.__name__: cls for cls in (ADMUNet2DModel, NoisyClassifier)}


def released_network(name: str, subfolder: str | None) -> Path:
    """
    Returns the folder of a released checkpoint that holds the network to export. A missing checkpoint is downloaded.

    Args:
        name: Name of the released checkpoint.
        subfolder: `"classifier"` for the classifier that guides a UNet.

    Raises:
        ValueError: If there is no such network.
        OSError: If it cannot be downloaded.
    """
    released = released_checkpoint(name)
    if released.kind == "classifier" and subfolder == "unet":
        raise ValueError(f"{name} is a classifier: leave out --subfolder {subfolder}.")
    if released.kind != "classifier" and subfolder == "classifier":
        released = guiding_classifier(released)
        if released is None:
            raise ValueError(f"{name} has no classifier: leave out --subfolder {subfolder}.")
    return released_folder(released.name, released.kind)[0]


def download_network(repo_id: str, subfolder: str | None, revision: str | None, variant: str | None) -> Path:
    """
    Downloads a network with its config and card from the Hub, and returns the folder. The arguments are those of `load_network`.

    Raises:
        OSError: If the Hub has no such repository, or cannot be reached.
    """
    files = ["config.json", *weight_files(variant)]
    files += [f"{subfolder or 'unet'}/{file}" for file in files]
    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[CARD_FILE, "model_index.json", *files])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"The network must be a folder or a repository on the Hub, but got {repo_id!r}. {error}"
        ) from error


def load_network(
    model: str | None = None, subfolder: str | None = None, revision: str | None = None, variant: str | None = None
) -> ModelMixin:
    """
    Loads the network to export.

    Args:
        model: Folder or Hub id of a pipeline or network, `shipped:NAME` of a pipeline that ships with this package, `released:NAME` of
            a released checkpoint, or `None` for the default model.
        subfolder: Network of a pipeline: `"unet"`, which is the default, or `"classifier"`.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files, such as `"fp16"`.

    Raises:
        ValueError: If there is no such network, or its class is of another package.
        OSError: If a file is missing or damaged, or cannot be downloaded.
    """
    check_variant(variant)
    model = name_or_folder(model)
    released = name_of_released(model)
    if revision is not None and (released is not None or Path(model).is_dir()):
        raise ValueError(f"--revision {revision} requires a network on the Hub, but got --model {model}.")
    if released is not None:
        folder = released_network(released, subfolder)
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        check_is_saved_model(model)
        folder = download_network(model, subfolder, revision, variant)
    if (folder / "model_index.json").is_file():
        folder = folder / (subfolder or "unet")
    elif subfolder is not None and Path(model).is_dir():
        raise ValueError(f"--subfolder {subfolder} requires a pipeline, but {model} has no model_index.json.")
    class_name = read_config(folder / "config.json").get("_class_name")
    if class_name not in CLASSES:
        raise ValueError(
            f"The network must be of the class {' or '.join(CLASSES)}, but {str(folder)!r} holds {class_name}."
        )
    return CLASSES[class_name].from_pretrained(folder, variant=variant)
