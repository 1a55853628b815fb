"""Checks of a pipeline's components and of the images of a call."""

import warnings
from collections.abc import Mapping

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import unwrap_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from diffusers_adm.checks import check_images, is_integer
from diffusers_adm.guidance import ClassifierGuidance, GuidanceFunction, GuidanceOptions
from diffusers_adm.guidance.gradient import moves_weights
from diffusers_adm.guidance.sums import networks_of_guidance, summands
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.models.class_names import check_same_classes
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.solvers import check_scheduler, check_sigma_scheduler


# Class of each network, and the entries of its config that pipelines read.
PARTS = {
    "unet": (
        "ADMUNet2DModel",
        ("sample_size", "in_channels", "num_class_embeds", "use_null_class", "low_res_conditioning"),
    ),
    "classifier": ("NoisyClassifier", ("sample_size", "in_channels", "num_classes")),
}


def check_parts(unet: ADMUNet2DModel, classifier: NoisyClassifier | None) -> None:
    """Raises a ValueError if a network is neither of the expected class nor a network with the same config entries."""
    for name, network in (("unet", unet), ("classifier", classifier)):
        class_name, entries = PARTS[name]
        config = getattr(network, "config", None)
        # The config decides, because classes from saved code are different classes, and a compiled model is a wrapper.
        fits = callable(network) and isinstance(config, Mapping) and config.keys() >= set(entries)
        if not fits and not (name == "classifier" and network is None):
            raise ValueError(f"`{name}` must be an instance of {class_name}, but got {type(network).__name__}.")


def check_scheduler_fits(unet: ADMUNet2DModel, scheduler: SchedulerMixin) -> None:
    """Raises a ValueError if the scheduler is not supported for a UNet that is given the timestep or the noise level."""
    if unet.config.get("preconditioning") is None:
        check_scheduler(scheduler)
    else:
        check_sigma_scheduler(scheduler)


def check_guidance_options(
    pipeline: DiffusionPipeline, options: GuidanceOptions, guidance_fn: GuidanceFunction | None, eta: float
) -> None:
    """
    Checks options of guidance that depend on what guides, and on the scheduler.

    Args:
        pipeline: Pipeline of the run.
        options: Options of guidance.
        guidance_fn: Guidance function of the caller. `None` means guidance by the classifier.
        eta: Noise of DDIM.

    Raises:
        ValueError: If an option requires another guidance function or scheduler.
    """
    scheduler, name = pipeline.scheduler, type(pipeline.scheduler).__name__
    noise_aware = all(isinstance(part, ClassifierGuidance) for part in summands(guidance_fn))
    if options.needs_function_of_x_0 and (guidance_fn is None or noise_aware):
        raise ValueError(
            "`through_unet`, `x_0_weight` and `smoothing` require a `guidance_fn` that is applied to the predicted x_0, such as"
            " CleanClassifierGuidance, but a noise-aware classifier is applied to x_t."
        )
    if options.entropy_scaling and guidance_fn is not None:
        raise ValueError(
            "`entropy_scaling` requires guidance by the classifier and cannot be combined with `guidance_fn`."
        )
    if options.gradient_at == "mean" and options.goes_through_unet(guidance_fn):
        raise ValueError("gradient_at='mean' is not supported for a `guidance_fn` with through_unet=True. Pass 'x_t'.")
    if options.gradient_at == "mean" and not isinstance(scheduler, DDPMScheduler):
        raise ValueError(f"gradient_at='mean' requires DDPMScheduler, but the scheduler is {name}.")
    if options.recurrence > 1 and not isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        raise ValueError(f"`recurrence` requires DDPMScheduler or DDIMScheduler, but the scheduler is {name}.")
    has_noise = isinstance(scheduler, DDPMScheduler) or (isinstance(scheduler, DDIMScheduler) and eta > 0)
    if options.spherical is not None and not has_noise:
        raise ValueError(
            f"`spherical` requires steps with noise, of DDPMScheduler or of DDIMScheduler with `eta` above 0, but the scheduler is {name}"
            f" with eta={eta}."
        )


def check_takes_timesteps(unet: ADMUNet2DModel, what: str) -> None:
    """
    Raises a ValueError if the UNet is given noise levels instead of timesteps.

    Args:
        unet: UNet to check.
        what: Method or argument that requires timesteps.
    """
    if unet.config.get("preconditioning") is not None:
        raise ValueError(
            f"`{what}` requires a UNet that is given timesteps, but this UNet is given noise levels"
            f" (preconditioning={unet.config.preconditioning!r}). To predict x_0, call unet(x_0 + sigma * epsilon, sigma)."
        )


def check_data(name: str, images: torch.Tensor, channels: int | str = "channels") -> None:
    """Raises a ValueError if images are not a tensor `(batch, channels, height, width)`, or are on the device 'meta'."""
    check_images(name, images, channels)
    if images.is_meta:
        raise ValueError(f"`{name}` must hold data, but it is on the device 'meta'.")


def count_images(batch_size: int, latents: torch.Tensor | None, **inputs: torch.Tensor | list | None) -> int:
    """
    Returns the number of images of a call.

    Args:
        batch_size: Argument `batch_size` of the call. Its default, 1, has no effect if another input is given.
        latents: Noise or noised images, or `None`.
        inputs: Other inputs with one entry per image, by name.

    Raises:
        ValueError: If the numbers differ or are 0, or latents are not images.
    """
    if latents is not None:
        check_data("latents", latents)
    if not is_integer(batch_size):
        raise ValueError(f"`batch_size` must be an integer, but got {batch_size!r}.")
    inputs["latents"] = latents
    counts = {name: len(value) for name, value in inputs.items() if value is not None}
    if batch_size != 1 or not counts:
        counts["batch_size"] = batch_size
    if len(set(counts.values())) > 1 or min(counts.values()) < 1:
        given = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"All inputs must have the same number of images, at least 1, but got {given}.")
    return next(iter(counts.values()))


def networks_that_predict(pipeline: DiffusionPipeline, options: SamplingOptions) -> dict[str, torch.nn.Module]:
    """Returns the networks of a run that predict, by name."""
    weaker = {"weaker": options.weaker} if isinstance(options.weaker, torch.nn.Module) else {}
    return {"unet": pipeline.unet, **weaker}


def networks_that_guide(pipeline: DiffusionPipeline, options: SamplingOptions) -> dict[str, torch.nn.Module | None]:
    """Returns the networks of a run that guide, by name."""
    if options.guidance_fn is None:
        return {"classifier": pipeline.classifier}
    networks = enumerate(networks_of_guidance(options.guidance_fn), start=1)
    return {f"network {number} ({type(network).__name__}) of `guidance_fn`": network for number, network in networks}


def check_eval_mode(networks: dict[str, torch.nn.Module | None]) -> None:
    """
    Raises a ValueError if a network is in training mode and differs from itself in eval mode.

    Args:
        networks: Networks by name.
    """
    for name, network in networks.items():
        if getattr(network, "training", False) and any(map(_changes_in_training, network.modules())):
            raise ValueError(
                f"The {name} must be in eval mode, because its dropout or batch normalisation is active in training mode. Call `eval()`"
                " of this network."
            )


def _changes_in_training(module: torch.nn.Module) -> bool:
    """Returns whether a layer has another output in training mode than in eval mode."""
    return bool(getattr(module, "p", 0)) if isinstance(module, _DropoutNd) else isinstance(module, _BatchNorm)


def check_with_gradients(
    options: SamplingOptions,
    output_type: str,
    predicting: dict[str, torch.nn.Module],
    guiding: dict[str, torch.nn.Module | None],
) -> None:
    """
    Checks a run whose result has gradients.

    Args:
        options: Resolved options of the run.
        output_type: Type of the images.
        predicting: Networks that predict, by name.
        guiding: Networks that guide, by name.

    Raises:
        ValueError: If an option has no gradient, the images cannot carry one, a network that guides has gradient checkpointing, or the
            weights of a network are moved in each forward pass.
    """
    if not options.with_gradients:
        return
    for name, network in guiding.items():
        if getattr(network, "is_gradient_checkpointing", False):
            raise ValueError(
                f"`with_gradients` does not support gradient checkpointing of the {name}, because each step is recomputed already. Call"
                " `disable_gradient_checkpointing()` of this network."
            )
    for name, network in (predicting | guiding).items():
        if network is not None and moves_weights(network):
            raise ValueError(
                f"`with_gradients` requires weights that stay in place, but those of the {name} are offloaded or cast in each layer."
                " Load it without offloading and layerwise casting."
            )
    if output_type not in ("pt", "latent"):
        raise ValueError(f"`with_gradients` requires output_type='pt' or 'latent', but got {output_type!r}.")
    if options.particles not in (None, 1):
        raise ValueError(
            "`with_gradients` requires one particle per image, because the choice of particles has no gradient, but got"
            f" particles={options.particles}."
        )
    guidance_options = GuidanceOptions.parse(options.guidance_options)
    if guidance_options.goes_through_unet(options.guidance_fn):
        raise ValueError(
            "`with_gradients` does not support guidance with through_unet=True, because it would keep second derivatives of the UNet of"
            " all steps in memory."
        )
    if guidance_options.entropy_scaling:
        raise ValueError("`with_gradients` does not support `entropy_scaling`, whose factor has no gradient.")
    if guidance_options.smoothing:
        raise ValueError("`with_gradients` does not support `smoothing`, whose noise would be drawn again.")
    if any(getattr(part, "generator", None) is not None for part in summands(options.guidance_fn)):
        raise ValueError(
            "`with_gradients` does not support CLIPGuidance with a generator, which would be drawn from again."
        )


def check_finite(x_0: torch.Tensor) -> None:
    """Raises a ValueError if an image is not finite. The message names all such images."""
    failed = (~x_0.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if failed:
        raise ValueError(
            f"Images {failed} of {len(x_0)} are not finite after the last step. Check for NaN and infinity in the weights, in"
            " `latents` and in the output of callbacks, for a large `cfg_weight`, and for a UNet that overflows float16."
        )


def check_classifier(pipeline: DiffusionPipeline) -> None:
    """Raises a ValueError if the classifier does not fit the UNet's images, noise and classes."""
    unet, classifier, scheduler = pipeline.unet.config, pipeline.classifier.config, pipeline.scheduler.config
    for name in ("sample_size", "in_channels"):
        if unet[name] != classifier[name]:
            raise ValueError(
                f"UNet and classifier must have the same `{name}`, but got {unet[name]} and {classifier[name]}."
            )
    noise = ["num_train_timesteps"]
    if unet.get("preconditioning") is not None:
        unknown = [name for name in (*noise, "beta_schedule") if classifier.get(name) is None]
        if unknown:
            raise ValueError(
                f"The classifier's config must have {' and '.join(unknown)}, because a UNet with preconditioning requires the noise"
                f" level of each of its timesteps. Add the training value with classifier.register_to_config({unknown[0]}=...)."
            )
        noise = []
    elif scheduler.trained_betas is None:  # trained betas override the schedule
        noise.append("beta_schedule")
    for name in noise:
        trained_with = classifier.get(name)
        if trained_with not in (None, scheduler[name]):
            raise ValueError(
                f"The classifier was trained with {name}={trained_with!r}, but the scheduler has {scheduler[name]!r}, so its"
                " timesteps would mean other noise levels. Train it with the noise schedule of the UNet."
            )
    if pipeline.config.id2label is not None and classifier.get("id2label") is not None:
        check_same_classes(pipeline.config.id2label, classifier["id2label"])


def check_classifier_of_call(pipeline: DiffusionPipeline, options: SamplingOptions, height: int, width: int) -> None:
    """
    Raises a ValueError if the classifier that guides does not take images of a size. Warns if it has another number of classes than
    the UNet, and both are given the labels.
    """
    config, unet_classes = pipeline.classifier.config, pipeline.unet.config.num_class_embeds
    size, classes = config["sample_size"], config["num_classes"]
    if options.unet_takes_labels(pipeline) and unet_classes != classes:
        warnings.warn(
            f"The UNet has {unet_classes} classes and the classifier has {classes}. Both are given the labels, which must mean the same"
            " classes.",
            stacklevel=2,
        )
    if config.get("pool") == "attention" and not height == width == size:
        raise ValueError(
            f"`height` and `width` must be {size} with guidance by this classifier, whose pool='attention' takes no other size, but got"
            f" {height} and {width}."
        )


def check_weaker_unet(weaker: ADMUNet2DModel, unet: ADMUNet2DModel, has_class: bool) -> None:
    """
    Checks that the predictions of a weaker UNet can be combined with those of the pipeline's UNet.

    Args:
        weaker: Weaker UNet.
        unet: UNet of the pipeline.
        has_class: Whether the UNet is given the class of each image.

    Raises:
        ValueError: If the UNets differ in their classes or images.
    """
    names = [type(unwrap_module(network)).__name__ for network in (weaker, unet)]
    if names[0] != names[1]:  # names are compared, because classes from saved code are different classes
        raise ValueError(f"`weaker` must be an {names[1]}, but got {names[0]}.")
    if not has_class and weaker.config.num_class_embeds is not None and weaker.null_class is None:
        raise ValueError(
            "`weaker` must have a null class (use_null_class) or no classes, because the UNet is given no class."
        )
    for name in ("sample_size", "in_channels", "num_class_embeds", "low_res_conditioning", "preconditioning"):
        ours, theirs = unet.config.get(name), weaker.config.get(name)
        if ours != theirs and not (name == "num_class_embeds" and theirs is None):
            raise ValueError(f"`weaker` must have the {name} of the UNet, {ours}, but has {theirs}.")
