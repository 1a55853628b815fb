"""Arguments of a pipeline's call that hold for the whole run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import ConfigMixin

from diffusers_adm.guidance import GuidanceFunction, GuidanceOptions
from diffusers_adm.guidance.sums import classes_of_guidance
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.solvers import Churn, Restart, Solver, build_sigma_solver, build_solver, takes_respacing


# Largest scale or weight. Its product with a prediction of the same size is still finite in float32.
LARGEST = torch.finfo(torch.float32).max ** 0.5


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of a pipeline's call that hold for the whole run, see [`ClassifierGuidedPipeline.__call__`]."""

    guidance_scale: float | list[float] | torch.Tensor | None = None
    num_inference_steps: int | None = None
    timestep_respacing: str | None = None
    condition_unet: bool = True
    eta: float = 0.0
    cfg_weight: float | list[float] | torch.Tensor = 0.0
    weaker: str | dict | ADMUNet2DModel | Callable | None = None
    guidance_fn: GuidanceFunction | None = None
    guidance_options: GuidanceOptions | dict | str | None = None
    timesteps: list[int] | None = None
    churn: Churn | dict | None = None
    guider: ConfigMixin | dict | None = None
    epsilon_scale: float | tuple[float, float] | None = None
    particles: int | None = None
    with_gradients: bool = False
    sigmas: list[float] | None = None
    restart: Restart | dict | list | None = None

    def resolved(self, pipeline) -> "SamplingOptions":
        """
        Replaces options that are `None` by the defaults of a pipeline.

        Args:
            pipeline: Pipeline of the run.
        """
        changes, config = {}, pipeline.config
        if self.guidance_scale is None:
            guides = self.guidance_fn is not None or pipeline.classifier is not None
            changes["guidance_scale"] = config.guidance_scale if guides else 0.0
        steps = (self.timestep_respacing, self.num_inference_steps, self.timesteps, self.sigmas)
        if all(given is None for given in steps):
            changes["num_inference_steps"] = config.num_inference_steps
            if takes_respacing(pipeline.scheduler):
                changes["timestep_respacing"] = config.timestep_respacing
        return replace(self, **changes)

    def solver(self, pipeline) -> Solver:
        """
        Returns a run of the pipeline's scheduler. The options must be resolved.

        Args:
            pipeline: Pipeline of the run.

        Raises:
            ValueError: If an option is out of its range, or does not fit the scheduler.
        """
        unet, steps = pipeline.unet.config, (self.num_inference_steps, self.timestep_respacing)
        if unet.get("preconditioning") is not None:
            sigma_range = (unet.sigma_min, unet.sigma_max)
            lists = (self.sigmas, self.restart)
            return build_sigma_solver(
                pipeline.scheduler, sigma_range, *steps, self.timesteps, self.eta, self.churn, *lists
            )
        lists = (self.timesteps, self.sigmas)
        return build_solver(pipeline.scheduler, *steps, self.eta, *lists, self.churn, self.restart)

    def unet_takes_labels(self, pipeline) -> bool:
        """Returns whether the UNet is given the class of each image."""
        return self.condition_unet and pipeline.unet.config.num_class_embeds is not None

    def guided_by_classifier(self, pipeline) -> bool:
        """Returns whether the pipeline's classifier guides any image. The options must be resolved."""
        if self.guidance_fn is not None or pipeline.classifier is None:
            return False
        scale = self.guidance_scale
        return bool(torch.as_tensor(scale).any())

    def num_classes(self, pipeline) -> int | None:
        """
        Returns the number of classes that all networks and guidance functions have that are given labels, or `None` if none of them
        has classes. The options must be resolved.

        Args:
            pipeline: Pipeline of the run.
        """
        receivers = [pipeline.unet.config.num_class_embeds] if self.unet_takes_labels(pipeline) else []
        receivers += [pipeline.classifier.config.num_classes] if self.guided_by_classifier(pipeline) else []
        receivers += classes_of_guidance(self.guidance_fn)
        return min(receivers, default=None)


def per_image(given: float | list[float] | torch.Tensor, batch_size: int, name: str) -> list[float]:
    """
    Returns one number per image.

    Args:
        given: One number for all images, or one per image.
        batch_size: Number of images.
        name: Name of the argument, for error messages.

    Raises:
        ValueError: If a value is not a real number, or is so large that products with it are not finite in float32, or the number of
            values is neither 1 nor the number of images.
    """
    try:
        if isinstance(given, (torch.Tensor, np.ndarray)):
            given = torch.as_tensor(given).cpu()  # MPS has no float64
            if given.is_complex():
                raise TypeError("complex numbers")
        tensor = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be one number, or one number per image, but got {given!r}.") from error
    values = [tensor.item()] * batch_size if tensor.ndim == 0 else tensor.flatten().tolist()
    if len(values) != batch_size:
        raise ValueError(f"`{name}` must have one number per image, {batch_size}, but got {len(values)}.")
    if not all(abs(value) <= LARGEST for value in values):
        raise ValueError(f"`{name}` must be finite, with an absolute value of at most {LARGEST:.2g}, but got {given}.")
    return values
