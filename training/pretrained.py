"""Weights that training starts from, and low-rank adapters on them."""

import json
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, ModelMixin

from diffusers_adm.models import NoisyClassifier
from diffusers_adm.pipelines.released import name_of_released, released_folder
from diffusers_adm.training.options import ArchitectureOptions


logger = get_logger(__name__)

# Options of a model that may differ from those of the model that training starts from.
CLASS_OPTIONS = {"num_class_embeds", "use_null_class", "num_classes"}
SIZE_OPTIONS = {"sample_size", "in_channels", "out_channels"}
# Options of a model that no weight depends on.
FREE_OPTIONS = {"dropout", "num_train_timesteps", "beta_schedule", "id2label"}
# Weights whose shape depends on the channels of the images, and the dimension that does.
CHANNEL_WEIGHTS = {"encoder.conv_in.weight": 1, "conv_out.weight": 0, "conv_out.bias": 0}
# Layers that depend on classes or channels: adapters do not fit where they begin anew.
WHOLE_LAYERS = ("class_embedding", "encoder.conv_in", "conv_out", "pooling")
ADAPTER_FOLDER = "lora"


def start_from_pretrained(model: ModelMixin, options: ArchitectureOptions) -> None:
    """
    Gives a model the weights that the options name, if they name any.

    Args:
        model: Model to train.
        options: Options of the model.

    Raises:
        ValueError: If the models do not fit, or adapters are asked for without weights that they adapt.
    """
    name = options.pretrained_model_name_or_path
    if name is not None:
        load_pretrained(model, name, options.pretrained_subfolder, options.pretrained_flags)
    elif options.lora_rank is not None:
        raise ValueError(
            f"--lora_rank {options.lora_rank} needs a model to adapt: give --pretrained_model_name_or_path."
        )


def load_pretrained(model: ModelMixin, name: str, subfolder: str | None = None, flags: str | None = None) -> None:
    """
    Gives a model the weights of another one. Weights of other classes begin random, and those of new channels at 0. A new null
    class joins the known classes. A consistency model becomes an EDM model. Messages say what differs.

    Args:
        model: Model to train.
        name: Folder or Hub id of a pipeline or model, `released:NAME` of a released checkpoint, or a file of the original code.
        subfolder: Folder inside a pipeline. It is known by default.
        flags: Model flags of the original command line, for a file.

    Raises:
        ValueError: If the models differ in anything but classes, channels and resolution, or the other one cannot be loaded.
    """
    pretrained = read_pretrained(model, name, subfolder, flags)
    # Through JSON, as the saved one's has come: it knows no tuples.
    ours, theirs = json.loads(model.to_json_string()), json.loads(pretrained.to_json_string())
    # In pixels of the image: the same layers have others at another resolution.
    scale = ours["sample_size"] / theirs["sample_size"]
    theirs["attention_resolutions"] = [pixels * scale for pixels in theirs["attention_resolutions"]]
    differing = {option for option in ours if not option.startswith("_") and ours[option] != theirs[option]}
    differing -= FREE_OPTIONS
    if (theirs.get("preconditioning"), ours.get("preconditioning")) == ("consistency", "edm"):
        # The same network under scales that differ by about sigma_min.
        differing.remove("preconditioning")
        logger.warning(
            "%s is a consistency model. The trained model is no longer one: it needs many steps, such as 40 of Heun's method.",
            name,
        )
    if differing - CLASS_OPTIONS - SIZE_OPTIONS:
        pairs = ", ".join(f"{option} {theirs[option]} instead of {ours[option]}" for option in sorted(differing))
        raise ValueError(f"--pretrained_model_name_or_path {name} is of another architecture: {pairs}.")
    pairs = ", ".join(f"{option} {ours[option]} instead of {theirs[option]}" for option in sorted(differing))
    random_keys = copy_weights(model, pretrained)
    if random_keys:
        logger.warning("%s begin with random weights: %s.", ", ".join(random_keys), pairs)
    if differing & SIZE_OPTIONS:
        logger.warning("All other weights are taken over, and those of new channels begin at 0: %s.", pairs)


def read_pretrained(model: ModelMixin, name: str, subfolder: str | None, flags: str | None) -> ModelMixin:
    """
    Loads the model that training starts from.

    Args:
        model: Model to train.
        name: Name or path, see `load_pretrained`.
        subfolder: Folder inside a pipeline. It is known by default.
        flags: Model flags of the original command line, for a file.

    Raises:
        ValueError: If it cannot be loaded.
    """
    model_class, is_classifier = type(model), isinstance(model, NoisyClassifier)
    if Path(name).is_file():
        return model_class.from_openai(name, flags)
    if flags is not None:
        raise ValueError(f"--pretrained_flags are for a .pt file, but --pretrained_model_name_or_path is {name}.")
    if (released := name_of_released(name)) is not None:
        if subfolder is not None:
            raise ValueError(
                f"--pretrained_subfolder is for folders and Hub ids, but the model is {name}: leave it out."
            )
        upsamples = not is_classifier and model.config.low_res_conditioning
        kind = "classifier" if is_classifier else "upsampler" if upsamples else "unet"
        place, subfolder = released_folder(released, kind)
        return model_class.from_pretrained(place, subfolder=subfolder)
    if subfolder is None and is_pipeline(name):
        subfolder = "classifier" if is_classifier else "unet"
    return model_class.from_pretrained(name, subfolder=subfolder)


def is_pipeline(name: str) -> bool:
    """Returns whether a folder or a repository on the Hub holds a pipeline."""
    try:
        DiffusionPipeline.load_config(name)
    except OSError:
        return False
    return True


def copy_weights(model: ModelMixin, pretrained: ModelMixin) -> list[str]:
    """
    Copies all weights that both models have.

    Args:
        model: Model to train.
        pretrained: Model to start from.

    Returns:
        Names of the weights that are left as they are.
    """
    known, left = pretrained.state_dict(), []
    same_classes = all(
        model.config.get(name) == pretrained.config.get(name) for name in ("num_class_embeds", "num_classes")
    )
    for key, tensor in model.state_dict().items():
        if key in known and known[key].shape == tensor.shape:
            tensor.copy_(known[key])
        elif key in known and key in CHANNEL_WEIGHTS:
            channels = (model.config.in_channels, pretrained.config.in_channels)
            copy_channels(tensor, known[key], CHANNEL_WEIGHTS[key], *channels)
        elif key == "class_embedding.weight" and key in known and same_classes:
            rows = min(len(known[key]), len(tensor))
            tensor[:rows].copy_(known[key][:rows])
        else:
            left.append(key)
    return left


def copy_channels(tensor: torch.Tensor, known: torch.Tensor, dim: int, channels: int, known_channels: int) -> None:
    """
    Copies the weights of all channels that both have, image by image. All others become 0.

    Args:
        tensor: Weights to fill. Dimension `dim` has the channels of one or two images: noised and low-resolution image, or mean
            and variance.
        known: Weights to copy.
        dim: Dimension of the channels.
        channels: Number of channels of an image in `tensor`.
        known_channels: Number of channels of an image in `known`.
    """
    ours = tensor.zero_().unflatten(dim, (-1, channels))  # (..., images, channels, ...)
    theirs = known.unflatten(dim, (-1, known_channels))  # (..., images, known_channels, ...)
    for axis in (dim, dim + 1):
        both = min(ours.shape[axis], theirs.shape[axis])
        ours, theirs = ours.narrow(axis, 0, both), theirs.narrow(axis, 0, both)
    ours.copy_(theirs)


def add_adapter(model: ModelMixin, rank: int | None) -> None:
    """
    Adds low-rank adapters to the linear layers and convolutions, and freezes their weights (Hu et al. 2021, arXiv 2106.09685).
    Layers that depend on classes or channels are trained whole.

    Args:
        model: Model to train.
        rank: Rank of the adapters. `None` adds none.

    Raises:
        ValueError: If peft is not installed.
    """
    if rank is None:
        return
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("--lora_rank needs peft: pip install diffusers-adm[lora]") from error
    names = [name for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    adapted = [name for name in names if not name.startswith((*WHOLE_LAYERS, "time_embedding"))]
    whole = [name for name in WHOLE_LAYERS if any(name == other for other, _ in model.named_modules())]
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted, modules_to_save=whole)
    )  # fmt: skip


def save_adapter(model: ModelMixin, folder: Path) -> None:
    """Writes the adapter of a model into the folder that the merged model is saved to, if it has one."""
    if getattr(model, "peft_config", None):
        model.save_lora_adapter(folder / ADAPTER_FOLDER)
