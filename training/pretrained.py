"""Pretrained weights from which training starts, and low-rank adapters (LoRA)."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin

from diffusers_adm.choices import BETA_SCHEDULES
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.pipelines.released import name_of_released, released_folder
from diffusers_adm.shipped import name_or_folder
from diffusers_adm.training.options import ArchitectureOptions


logger = get_logger(__name__)

# Options that may differ between the model to train and the pretrained model.
CLASS_OPTIONS = {"num_class_embeds", "use_null_class", "num_classes"}
SIZE_OPTIONS = {"sample_size", "in_channels", "out_channels"}
# Options on which no weight depends.
FREE_OPTIONS = {"dropout", "num_train_timesteps", "beta_schedule", "id2label"}
# Weights whose shape depends on the channels of the images, and the dimension that depends on them.
CHANNEL_WEIGHTS = {"encoder.conv_in.weight": 1, "conv_out.weight": 0, "conv_out.bias": 0}
# Layers that depend on classes or channels. They are trained whole, because an adapter cannot train a layer that begins at random.
WHOLE_LAYERS = ("class_embedding", "encoder.conv_in", "conv_out", "pooling")
ADAPTER_FOLDER = "lora"


def kind_of(model: ModelMixin) -> str:
    """Returns the kind of a model: "unet", "upsampler" or "classifier"."""
    if isinstance(model, NoisyClassifier):
        return "classifier"
    return "upsampler" if model.config.low_res_conditioning else "unet"


def start_from_pretrained(model: ModelMixin, options: ArchitectureOptions) -> None:
    """
    Loads pretrained weights into a model, if the options name any.

    Args:
        model: Model to train.
        options: Options of the model.

    Raises:
        ValueError: If the models do not fit together, or adapters are requested without pretrained weights.
    """
    name = options.pretrained_model_name_or_path
    if name is None:
        check_no_adapter(options)
    else:
        load_pretrained(model, name, options.pretrained_subfolder, options.pretrained_flags)


def check_pretrained(model: ModelMixin, options: ArchitectureOptions) -> None:
    """
    Checks that training can start as the options say, without changing the model. Arguments and errors are those of
    `start_from_pretrained`.
    """
    name = options.pretrained_model_name_or_path
    if name is None:
        check_no_adapter(options)
    else:
        start = (options.pretrained_subfolder, options.pretrained_flags)
        differing_options(model, read_pretrained(kind_of(model), name, *start), name)


def check_no_adapter(options: ArchitectureOptions) -> None:
    """Raises a ValueError if the options of a model without pretrained weights request adapters."""
    if options.lora_rank is not None:
        raise ValueError(
            f"--lora_rank requires --pretrained_model_name_or_path, the model to adapt, but got only {options.lora_rank}."
        )


def differing_options(model: ModelMixin, pretrained: ModelMixin, name: str) -> dict[str, str]:
    """
    Compares the configs of two models.

    Args:
        model: Model to train.
        pretrained: Pretrained model.
        name: Name of the pretrained model.

    Returns:
        Description of each option of classes, channels and resolution that differs, by name.

    Raises:
        ValueError: If the models differ in other options.
    """
    ours, theirs = _config_of(model), _config_of(pretrained)
    # Resolutions are in pixels of the image, so the same layers have other values at another sample size.
    scale = ours["sample_size"] / theirs["sample_size"]
    theirs["attention_resolutions"] = [pixels * scale for pixels in theirs["attention_resolutions"]]
    differing = {option for option in ours if not option.startswith("_") and ours[option] != theirs[option]}
    differing -= FREE_OPTIONS
    kinds = theirs.get("preconditioning"), ours.get("preconditioning")
    if kinds[1] == "consistency":  # training begins by adapting the network to other scales
        differing -= {"preconditioning", "sigma_data", "sigma_min", "sigma_max"}
    if kinds == ("consistency", "edm"):
        differing.remove(
            "preconditioning"
        )  # both kinds use the same network. Their scales differ only by about sigma_min
    if kinds[1] == "consistency" and _given_logarithm(ours) != _given_logarithm(theirs):
        form = "log_sigma" if _given_logarithm(theirs) else "timestep"
        raise ValueError(f"--noise_embedding must be {form}, because {name} is given the noise level in this form.")
    if "preconditioning" not in differing and _given_logarithm(ours) != _given_logarithm(theirs):
        differing.add("beta_schedule")
    if differing - CLASS_OPTIONS - SIZE_OPTIONS:
        pairs = ", ".join(f"{option} {theirs[option]} instead of {ours[option]}" for option in sorted(differing))
        raise ValueError(
            f"--pretrained_model_name_or_path {name} has another architecture: {pairs}. Leave out --preset and all options of the"
            " architecture: their defaults are those of the model."
        )
    return {option: f"{option} {ours[option]} instead of {theirs[option]}" for option in sorted(differing)}


def _config_of(model: ModelMixin) -> dict[str, Any]:
    """Returns the config of a model as it is saved, with lists in place of tuples."""
    return json.loads(model.to_json_string())


def load_pretrained(model: ModelMixin, name: str, subfolder: str | None = None, flags: str | None = None) -> None:
    """
    Loads the weights of a pretrained model into another model. If the numbers of classes differ, the weights of classes begin at random
    values, otherwise class i begins with the weights of class i. The weights of new channels begin at 0. A null class can be added to
    the classes of the pretrained model. A consistency model becomes an EDM model. Warnings name all differences.

    Args:
        model: Model to train.
        name: Folder or Hub id of a pipeline or model, `released:NAME` of a released checkpoint, `shipped:NAME` of a pipeline that ships
            with this package, or a file of the original code.
        subfolder: Folder inside a pipeline. `None` means the folder of the model's kind.
        flags: Model flags of the original command line, for a file.

    Raises:
        ValueError: If the models differ in other options than classes, channels and resolution, or the pretrained model cannot be
            loaded.
    """
    pretrained = read_pretrained(kind_of(model), name, subfolder, flags)
    differing = differing_options(model, pretrained, name)
    ours, theirs = _config_of(model), _config_of(pretrained)
    kinds = theirs.get("preconditioning"), ours.get("preconditioning")
    if kinds == ("consistency", "edm"):
        logger.warning(
            "%s is a consistency model, but the trained model will not be one. It will need many steps, such as 40 of Heun's method.",
            name,
        )
    random_keys = copy_weights(model, pretrained)
    if kinds == (None, "consistency"):
        noise = read_noise_config("unet", name, subfolder, flags)
        if not _given_logarithm(ours):
            warn_of_differences(name, schedule_options(noise), schedule_options(ours))
        if noise.get("prediction_type", "epsilon") == "epsilon":
            # At low noise levels, the output of a network with preconditioning is -epsilon.
            for parameter in model.conv_out.parameters():
                parameter.data.neg_()
    if (
        theirs.get("use_null_class")
        and ours["num_class_embeds"]
        and not ours["use_null_class"]
        and kinds[1] != "consistency"
    ):
        logger.warning("The null class of %s is left out. To keep it, pass --label_dropout.", name)
    if random_keys:
        channels = ("in_channels", "out_channels")  # weights of new channels begin at 0
        reasons = ", ".join(words for option, words in differing.items() if option not in channels)
        logger.warning("The weights %s begin at random values, because of %s.", ", ".join(random_keys), reasons)
    if SIZE_OPTIONS & differing.keys():
        reasons = ", ".join(words for option, words in differing.items() if option in SIZE_OPTIONS)
        logger.warning(
            "All other weights are pretrained, and weights of new channels begin at 0, because of %s.", reasons
        )


def _given_logarithm(config: dict[str, Any]) -> bool:
    """Returns whether a model is given the logarithm of the noise level."""
    return config.get("preconditioning") is not None and config.get("beta_schedule") is None


def read_pretrained(kind: str, name: str, subfolder: str | None, flags: str | None) -> ModelMixin:
    """
    Loads the pretrained model from which training starts.

    Args:
        kind: Kind of the model to train: "unet", "upsampler" or "classifier".
        name: Name or path, see `load_pretrained`.
        subfolder: Folder inside a pipeline. `None` means the folder of the model's kind.
        flags: Model flags of the original command line, for a file.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    is_classifier = kind == "classifier"
    model_class = NoisyClassifier if is_classifier else ADMUNet2DModel
    if Path(name).is_file():
        return model_class.from_openai(name, flags)
    if flags is not None:
        raise ValueError(f"--pretrained_flags require a .pt file, but --pretrained_model_name_or_path is {name}.")
    if (released := name_of_released(name)) is not None:
        if subfolder is not None:
            raise ValueError(
                f"--pretrained_subfolder requires a folder or Hub id, but the model is {name}. Leave it out."
            )
        place, subfolder = released_folder(released, kind)
        return model_class.from_pretrained(place, subfolder=subfolder)
    name = name_or_folder(name)
    if subfolder is None and is_pipeline(name):
        subfolder = "classifier" if is_classifier else "unet"
    return model_class.from_pretrained(name, subfolder=subfolder)


def read_noise_config(kind: str, name: str, subfolder: str | None, flags: str | None) -> dict[str, Any]:
    """Returns the config that has the noise schedule of a pretrained model. It is empty for a UNet without a scheduler."""
    if kind == "classifier":
        return dict(read_pretrained(kind, name, subfolder, flags).config)
    if Path(name).is_file():
        return dict(PublishedCheckpoint(name, flags).scheduler().config)
    released = name_of_released(name)
    place = name_or_folder(name) if released is None else released_folder(released, kind)[0]
    try:
        return DDPMScheduler.load_config(place, subfolder="scheduler")
    except OSError:  # a UNet that is saved alone
        return {}


def schedule_options(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of the noise schedule in the config of a scheduler or a classifier. Unknown ones are `None`."""
    names = {value: name for name, value in BETA_SCHEDULES.items()}
    return {
        "noise_schedule": names.get(config.get("beta_schedule")),
        "num_train_timesteps": config.get("num_train_timesteps"),
    }


def warn_of_differences(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Warns if a pretrained model was trained with other options than a run has. Unknown ones are `None`."""
    for option, value in theirs.items():
        if value not in (None, ours[option]):
            logger.warning("%s was trained with --%s %s, but this run has %s.", name, option, value, ours[option])


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
        pretrained: Pretrained model.

    Returns:
        Names of the weights that were not copied.
    """
    known, left = pretrained.state_dict(), []
    same_classes = all(
        model.config.get(name) == pretrained.config.get(name) for name in ("num_class_embeds", "num_classes")
    )
    for key, tensor in model.state_dict().items():
        per_class = key == "class_embedding.weight"  # its rows may be other classes, or the null class
        if key in known and known[key].shape == tensor.shape and (same_classes or not per_class):
            tensor.copy_(known[key])
        elif key in known and key in CHANNEL_WEIGHTS:
            channels = (model.config.in_channels, pretrained.config.in_channels)
            copy_channels(tensor, known[key], CHANNEL_WEIGHTS[key], *channels)
        elif per_class and key in known and same_classes:
            rows = min(len(known[key]), len(tensor))
            tensor[:rows].copy_(known[key][:rows])
        else:
            left.append(key)
    return left


def copy_channels(tensor: torch.Tensor, known: torch.Tensor, dim: int, channels: int, known_channels: int) -> None:
    """
    Copies the weights of all channels that both tensors have. The weights of other channels become 0.

    Args:
        tensor: Weights to fill. Dimension `dim` has the channels of one image or of two, such as the noised and the low-resolution
            image, or mean and variance. Channels are copied separately for each image.
        known: Weights to copy.
        dim: Dimension of the channels.
        channels: Number of channels per image in `tensor`.
        known_channels: Number of channels per image in `known`.
    """
    ours = tensor.zero_().unflatten(dim, (-1, channels))  # (..., images, channels, ...)
    theirs = known.unflatten(dim, (-1, known_channels))  # (..., images, known_channels, ...)
    for axis in (dim, dim + 1):
        both = min(ours.shape[axis], theirs.shape[axis])
        ours, theirs = ours.narrow(axis, 0, both), theirs.narrow(axis, 0, both)
    ours.copy_(theirs)


def add_adapter(model: ModelMixin, rank: int | None) -> None:
    """
    Adds low-rank adapters to linear layers and convolutions, and freezes the weights of these layers (Hu et al. 2021, arXiv
    2106.09685). Layers that depend on classes or channels are trained whole.

    Args:
        model: Model to train.
        rank: Rank of the adapters. `None` adds none.

    Raises:
        ModuleNotFoundError: If peft is not installed.
    """
    if rank is None:
        return
    from peft import LoraConfig

    names = [name for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))]
    adapted = [name for name in names if not name.startswith((*WHOLE_LAYERS, "time_embedding"))]
    whole = [name for name in WHOLE_LAYERS if any(name == other for other, _ in model.named_modules())]
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted, modules_to_save=whole)
    )  # fmt: skip


def save_adapter(model: ModelMixin, folder: Path) -> None:
    """Writes the adapter of a model, if it has one, into the folder where the merged model is saved."""
    if getattr(model, "peft_config", None):
        model.save_lora_adapter(folder / ADAPTER_FOLDER)
