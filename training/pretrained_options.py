"""Options of a run that follow from the model that training starts from."""

import json
from typing import Any

from diffusers import ModelMixin

from diffusers_adm.training.options import TrainingOptions
from diffusers_adm.training.pretrained import (
    kind_of,
    read_noise_config,
    read_pretrained,
    schedule_options,
    warn_of_differences,
)


# Options that have the names of entries of a model's config.
SAME_NAMES = (
    "model_channels",
    "channel_mult",
    "layers_per_block",
    "attention_resolutions",
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "resnet_time_scale_shift",
    "output_scale_factor",
    "timestep_scale",
)
# Options that follow from the pretrained model, or from the run that is resumed.
FOLLOWING = (
    *SAME_NAMES,
    "resample_type",
    "resolution",
    "pool",
    "learn_sigma",
    "prediction_type",
    "noise_schedule",
    "num_train_timesteps",
    "preconditioning",
    "sigma_data",
    "sigma_min",
    "sigma_max",
    "noise_embedding",
)


def options_of_pretrained(
    kind: str, name: str, subfolder: str | None = None, flags: str | None = None, resolution: int | None = None
) -> dict[str, Any]:
    """
    Returns the options of a run that follow from the pretrained model: architecture, resolution, prediction and noise schedule.

    Args:
        kind: Kind of the model to train: "unet", "upsampler", "classifier" or "consistency".
        name: Name or path, see `load_pretrained`.
        subfolder: Folder inside a pipeline. `None` means the folder of the model's kind.
        flags: Model flags of the original command line, for a file.
        resolution: Resolution to train at, in pixels. `None` means that of the model.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    # The config goes through JSON, which turns tuples into lists, because a table in YAML has lists.
    start = "unet" if kind == "consistency" else kind
    config = json.loads(read_pretrained(start, name, subfolder, flags).to_json_string())
    options = {option: config[option] for option in SAME_NAMES} | {"resample_type": config["downsample_type"]}
    if resolution is None:
        options["resolution"] = config["sample_size"]
    else:
        pixels = config["attention_resolutions"]
        options["attention_resolutions"] = [size * resolution // config["sample_size"] for size in pixels]
    if kind == "classifier":
        return options | {"pool": config["pool"], **schedule_options(config)}
    given_sigma = config["preconditioning"] is not None
    if given_sigma:
        options |= {level: config[level] for level in ("sigma_data", "sigma_min", "sigma_max")}
    if kind == "consistency":
        given_logarithm = given_sigma and config["beta_schedule"] is None
        noise = config if given_sigma else read_noise_config(start, name, subfolder, flags)
        return options | schedule_options(noise) | {"noise_embedding": "log_sigma" if given_logarithm else "timestep"}
    options["learn_sigma"] = config["out_channels"] == 2 * config["in_channels"]
    if given_sigma:
        return options | {"preconditioning": "edm"}
    noise = read_noise_config(kind, name, subfolder, flags)
    return options | schedule_options(noise) | {"prediction_type": noise.get("prediction_type")}


def warn_of_another_schedule(model: ModelMixin, options: TrainingOptions) -> None:
    """Warns if the pretrained model of a run was trained with another noise schedule or prediction than the run has."""
    start = options.architecture
    name = start.pretrained_model_name_or_path
    if name is None or model.config.get("preconditioning") is not None:
        return
    noise = read_noise_config(kind_of(model), name, start.pretrained_subfolder, start.pretrained_flags)
    theirs, ours = schedule_options(noise), {**vars(options.diffusion)}
    if hasattr(options, "objective"):  # a classifier predicts no noise
        theirs["prediction_type"], ours["prediction_type"] = (
            noise.get("prediction_type"),
            options.objective.prediction_type,
        )
    warn_of_differences(name, theirs, ours)
