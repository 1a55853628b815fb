"""Checks of networks and images that belong to no argument alone."""

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module

from diffusers_adm.checks import check_images, is_integer
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.models.class_names import check_same_classes
from diffusers_adm.solvers import check_scheduler, check_sigma_scheduler


# What pipelines read in the config of each network, by the name of the class that has it.
PARTS = {
    "unet": (
        "ADMUNet2DModel",
        ("sample_size", "in_channels", "num_class_embeds", "use_null_class", "low_res_conditioning"),
    ),
    "classifier": ("NoisyClassifier", ("sample_size", "in_channels", "num_classes")),
}


def check_parts(unet: ADMUNet2DModel, classifier: NoisyClassifier | None) -> None:
    """Raises a ValueError unless the networks of a pipeline are a UNet and a classifier, or can take their place."""
    for name, network in (("unet", unet), ("classifier", classifier)):
        class_name, entries = PARTS[name]
        config = getattr(network, "config", None)
        # By its config: saved code has classes of its own, and a compiled model hides its class.
        fits = callable(network) and isinstance(config, Mapping) and config.keys() >= set(entries)
        if not fits and not (name == "classifier" and network is None):
            raise ValueError(f"`{name}` must be an instance of {class_name}, but got {type(network).__name__}.")


def check_scheduler_fits(unet: ADMUNet2DModel, scheduler: SchedulerMixin) -> None:
    """Raises a ValueError unless the scheduler is known to sample right with what the UNet is told, timestep or noise level."""
    if unet.config.get("preconditioning") is None:
        check_scheduler(scheduler)
    else:
        check_sigma_scheduler(scheduler)


def check_told_timesteps(unet: ADMUNet2DModel, what: str) -> None:
    """
    Raises a ValueError if the UNet is told the noise level.

    Args:
        unet: UNet to check.
        what: Method or argument that requires timesteps.
    """
    if unet.config.get("preconditioning") is not None:
        raise ValueError(
            f"`{what}` requires a UNet that is told timesteps, but this one has"
            f" preconditioning={unet.config.preconditioning!r}: unet(x_0 + sigma * epsilon, sigma) predicts x_0."
        )


def check_data(name: str, images: torch.Tensor, channels: int | str = "channels") -> None:
    """Raises a ValueError unless images are a tensor `(batch, channels, height, width)` that holds data, and not just a shape."""
    check_images(name, images, channels)
    if images.is_meta:
        raise ValueError(f"`{name}` must hold data, but it is on the device 'meta'.")


def count_images(batch_size: int, latents: torch.Tensor | None, **inputs: torch.Tensor | list | None) -> int:
    """
    Returns the number of images of a call.

    Args:
        batch_size: Number that the call gives; 1 says nothing where an input says how many there are.
        latents: x_T, or `None`.
        inputs: Inputs of one entry per image, by name.

    Raises:
        ValueError: If the numbers differ, or there is no image, or latents are not images.
    """
    if latents is not None:
        check_data("latents", latents)
    if not is_integer(batch_size):
        raise ValueError(f"batch_size={batch_size!r} is not an integer.")
    inputs["latents"] = latents
    counts = {name: len(value) for name, value in inputs.items() if value is not None}
    if batch_size != 1 or not counts:
        counts["batch_size"] = batch_size
    if len(set(counts.values())) > 1 or min(counts.values()) < 1:
        given = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"The number of images must be one and the same, at least 1; given were: {given}.")
    return next(iter(counts.values()))


def check_no_dropout(**models: torch.nn.Module | None) -> None:
    """Raises a ValueError if a model would drop features at random."""
    for name, model in models.items():
        if getattr(model, "training", False) and any(
            isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()
        ):
            raise ValueError(
                f"The {name} is in training mode, in which its dropout acts: call its eval() before sampling."
            )


def check_finite(x_0: torch.Tensor) -> None:
    """Raises a ValueError that names the images of which something is not finite."""
    failed = (~x_0.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if failed:
        raise ValueError(
            f"Images {failed} of {len(x_0)} are not finite after the last step: look for NaN or infinity in the weights, in"
            " `latents` and in what callbacks return, for a large `cfg_weight`, and for a UNet that overflows float16."
        )


def check_classifier(pipeline: DiffusionPipeline) -> None:
    """Raises a ValueError unless the classifier was made for the UNet's images, their noise and their classes."""
    unet, classifier, scheduler = pipeline.unet.config, pipeline.classifier.config, pipeline.scheduler.config
    for name in ("sample_size", "in_channels"):
        if unet[name] != classifier[name]:
            raise ValueError(f"UNet and classifier differ in {name}: {unet[name]} and {classifier[name]}.")
    noise = ["num_train_timesteps"]
    if unet.get("preconditioning") is not None:
        unknown = [name for name in (*noise, "beta_schedule") if classifier.get(name) is None]
        if unknown:
            raise ValueError(
                f"The classifier's config lacks {' and '.join(unknown)}, from which a UNet with preconditioning tells at which"
                f" timesteps it has seen which noise level: register_to_config({unknown[0]}=...) adds what it was trained with."
            )
        noise = []
    elif scheduler.trained_betas is None:  # otherwise they take the place of the schedule
        noise.append("beta_schedule")
    for name in noise:
        trained_with = classifier.get(name)
        if trained_with not in (None, scheduler[name]):
            raise ValueError(
                f"The classifier was trained with {name}={trained_with!r}, but the scheduler has {scheduler[name]!r}: it"
                " would be told wrong noise levels. Train it with the noise of the UNet."
            )
    if pipeline.config.id2label is not None and classifier.get("id2label") is not None:
        check_same_classes(pipeline.config.id2label, classifier["id2label"])


def check_weaker_unet(weaker: ADMUNet2DModel, unet: ADMUNet2DModel, told_class: bool) -> None:
    """
    Checks that the predictions of a weaker UNet can be weighed against those of the pipeline's UNet.

    Args:
        weaker: Weaker UNet.
        unet: UNet of the pipeline.
        told_class: Whether the UNet is given the class of each image.

    Raises:
        ValueError: If the UNets differ in their classes or images.
    """
    names = [type(unwrap_module(network)).__name__ for network in (weaker, unet)]  # of a compiled one, the model's
    if names[0] != names[1]:  # by name, because saved code has classes of its own
        raise ValueError(f"`weaker` must be an {names[1]}, but got {names[0]}.")
    if not told_class and weaker.config.num_class_embeds is not None and weaker.null_class is None:
        raise ValueError("`weaker` has no null class (use_null_class), and the UNet is given no class.")
    for name in ("sample_size", "in_channels", "num_class_embeds", "low_res_conditioning", "preconditioning"):
        ours, theirs = unet.config.get(name), weaker.config.get(name)
        if ours != theirs and not (name == "num_class_embeds" and theirs is None):
            raise ValueError(f"`weaker` differs from the UNet in {name}: {theirs} and {ours}.")
