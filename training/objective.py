"""Training objectives: losses of a UNet and of a classifier for a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, SchedulerMixin
from torch import nn

from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.losses import classifier_loss, edm_loss, hybrid_loss, vlb_loss
from diffusers_adm.openai.flags import Flags
from diffusers_adm.openai.schedulers import build_scheduler, build_sigma_scheduler
from diffusers_adm.training.objective_options import ObjectiveOptions
from diffusers_adm.training.options import DiffusionOptions, UNetTrainingOptions
from diffusers_adm.training.timestep_sampling import SAMPLERS


@dataclass
class LossTerms:
    """
    Result of an objective for one batch.

    Args:
        loss: Loss to minimise, `(batch,)`.
        logged: Additional values to log by name, `(batch,)` each.
        timestep: Timestep of each image, `(batch,)`, or the number of its noise level among as many levels.
        weight: Weight that the loss and the logged values of each image contain, `(batch,)`. `None` means 1.
    """

    loss: torch.Tensor
    logged: dict[str, torch.Tensor]
    timestep: torch.Tensor
    weight: torch.Tensor | None = None


Objective = Callable[[nn.Module, dict], LossTerms]


def build_noise_scheduler(
    diffusion: DiffusionOptions, learn_sigma: bool = True, predict_xstart: bool = False
) -> DDPMScheduler:
    """
    Builds the scheduler of the training, which is also saved with the UNet.

    Raises:
        ValueError: If the noise schedule needs more timesteps.
    """
    flags = Flags(
        diffusion_steps=diffusion.num_train_timesteps,
        noise_schedule=diffusion.noise_schedule,
        predict_xstart=predict_xstart,
    )
    return build_scheduler(flags, learn_sigma)


def sampling_defaults(options: UNetTrainingOptions) -> dict[str, Any]:
    """
    Returns the scheduler of a UNet's pipeline, and its number of steps, as arguments of the pipeline. The scheduler of a UNet that is
    given the timestep has the noise schedule of the training.

    Raises:
        ValueError: If the noise schedule needs more timesteps.
    """
    if options.noise_levels.preconditioning is not None:
        flags = Flags(training_mode="edm")
        return {"scheduler": build_sigma_scheduler(flags), "num_inference_steps": flags["steps"]}
    objective = options.objective
    scheduler = build_noise_scheduler(options.diffusion, objective.learn_sigma, objective.predicts_x_0)
    return {"scheduler": scheduler, "num_inference_steps": min(250, options.diffusion.num_train_timesteps)}


class DenoisingObjective:
    """
    Noises images at random timesteps and computes the loss of a UNet's prediction.

    Args:
        options: Settings of the loss and distribution of the timesteps.
        scheduler: Scheduler of the training.
        accelerator: Accelerator of the script.
        conditions: Function that returns the UNet's arguments for a batch, without the noised images and their timesteps.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        scheduler: DDPMScheduler,
        accelerator: Accelerator,
        conditions: Callable[[dict], dict],
    ):
        self.options = options
        self.accelerator = accelerator
        self.conditions = conditions
        self.schedule = NoiseSchedule.from_config(scheduler.config).to(accelerator.device)
        self.sampler = SAMPLERS[options.schedule_sampler](len(self.schedule)).to(accelerator.device)

    def __call__(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the terms of the loss at timesteps that the timestep sampler draws."""
        timestep, weight = self.sampler.sample(len(batch["image"]), batch["image"].device)  # (batch,) each
        terms = self.terms(model, batch, timestep)
        if self.sampler.needs_losses:
            self.sampler.update(*self.accelerator.gather((timestep, terms.loss.detach())))
        # With the weights, the means of the logged values are those of uniform timesteps.
        logged = {name: value * weight for name, value in terms.logged.items()}
        return LossTerms(terms.loss * weight, logged, timestep, weight)

    def terms(self, model: nn.Module, batch: dict, timestep: torch.Tensor) -> LossTerms:
        """Computes the terms of the loss at given timesteps, `(batch,)`."""
        options, schedule = self.options, self.schedule
        x_0 = batch["image"]  # (batch, channels, resolution, resolution)
        noise = draw_noise(x_0, options.noise_offset)
        x_t = add_noise(schedule, x_0, timestep, noise)
        model_output = model(x_t, timestep, **self.conditions(batch)).sample  # (batch, (2 *) channels, ...)
        if options.loss == "vlb":
            loss = vlb_loss(model_output, schedule, x_0, x_t, timestep, options.prediction_type)
            return LossTerms(loss, {"vlb": loss}, timestep)
        loss = hybrid_loss(
            model_output, schedule, x_0, x_t, timestep, noise, options.prediction_type, options.vlb_weight
        )
        logged = {"simple": loss.simple} if loss.vlb is None else {"simple": loss.simple, "vlb": loss.vlb}
        return LossTerms(loss.total, logged, timestep)

    def held_out_terms(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the terms of the loss at uniformly drawn timesteps."""
        x_0 = batch["image"]
        return self.terms(model, batch, torch.randint(len(self.schedule), x_0.shape[:1], device=x_0.device))


class NoiseLevelObjective:
    """
    Noises images at random noise levels and computes the loss of a UNet that is given the noise level. The logarithm of the noise
    level is normally distributed (Karras et al. 2022, arXiv 2206.00364, Table 1).

    Args:
        options: Options of the run.
        conditions: Function that returns the UNet's arguments for a batch, without the noised images and their noise levels.
    """

    sampler = None

    def __init__(self, options: UNetTrainingOptions, conditions: Callable[[dict], dict]):
        self.levels = options.noise_levels
        self.noise_offset = options.objective.noise_offset
        self.num_ranks = options.diffusion.num_train_timesteps
        self.conditions = conditions

    def __call__(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the loss at randomly drawn noise levels."""
        x_0 = batch["image"]  # (batch, channels, resolution, resolution)
        deviations = torch.randn(len(x_0), device=x_0.device)  # (batch,)
        sigma = (self.levels.log_sigma_mean + self.levels.log_sigma_std * deviations).exp()  # (batch,)
        x = x_0 + sigma[:, None, None, None] * draw_noise(x_0, self.noise_offset)
        denoised = model(x, sigma, **self.conditions(batch)).sample  # (batch, channels, resolution, resolution)
        rank = (self.num_ranks * torch.special.ndtr(deviations)).long().clamp(max=self.num_ranks - 1)
        return LossTerms(edm_loss(denoised, x_0, sigma, self.levels.sigma_data), {}, rank)

    held_out_terms = __call__


def build_objective(
    options: UNetTrainingOptions,
    scheduler: SchedulerMixin,
    accelerator: Accelerator,
    conditions: Callable[[dict], dict],
) -> DenoisingObjective | NoiseLevelObjective:
    """
    Builds the objective of a UNet that is given the timestep or the noise level.

    Args:
        options: Options of the run.
        scheduler: Scheduler of the UNet.
        accelerator: Accelerator of the script.
        conditions: Function that returns the UNet's arguments for a batch, without the noised images and their noise.
    """
    if options.noise_levels.preconditioning is not None:
        return NoiseLevelObjective(options, conditions)
    return DenoisingObjective(options.objective, scheduler, accelerator, conditions)


def draw_noise(x_0: torch.Tensor, offset: float) -> torch.Tensor:
    """
    Draws noise of the shape of images, `(batch, channels, height, width)`.

    Args:
        x_0: Clean images.
        offset: Standard deviation of added noise that is the same at all pixels of a channel.
    """
    noise = torch.randn_like(x_0)
    return noise + offset * torch.randn_like(x_0[..., :1, :1]) if offset else noise


class ClassifierObjective:
    """
    Noises images at uniformly drawn timesteps and computes the loss of a classifier's prediction.

    Args:
        schedule: Noise schedule, on the device of the training.
        entropy_weight: Weight of the entropy of the prediction, which penalises confidence.
    """

    def __init__(self, schedule: NoiseSchedule, entropy_weight: float = 0.0):
        self.schedule = schedule
        self.entropy_weight = entropy_weight

    def __call__(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the terms of the loss at uniformly drawn timesteps."""
        logits, timestep = self.noised_logits(model, batch["image"])
        return self.terms(logits, batch["label"], timestep)

    def terms(self, logits: torch.Tensor, labels: torch.Tensor, timestep: torch.Tensor) -> LossTerms:
        """
        Computes the loss and the top-1 and top-5 accuracy.

        Args:
            logits: Logits of noised images, `(batch, num_classes)`.
            labels: Labels of the images, `(batch,)`.
            timestep: Timesteps of the images, `(batch,)`.
        """
        loss = classifier_loss(logits, labels, self.entropy_weight)
        return LossTerms(loss, correct_predictions(logits, labels), timestep)

    def noised_logits(
        self, model: nn.Module, x_0: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the logits of noised images, `(batch, num_classes)`, and their timesteps, `(batch,)`.

        Args:
            model: Classifier.
            x_0: Clean images, `(batch, channels, height, width)`.
            generator: Generator of the timesteps and of the noise. The default is the global one.
        """
        timestep = torch.randint(len(self.schedule), x_0.shape[:1], generator=generator, device=x_0.device)  # (batch,)
        noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_t = add_noise(self.schedule, x_0, timestep, noise)  # (batch, channels, height, width)
        return model(x_t, timestep).logits.float(), timestep


def correct_predictions(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns whether the label is the most likely class, and whether it is among the top five, `(batch,)` each."""
    likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (batch, 5)
    return {"accuracy": likeliest[:, 0].float(), "accuracy_top5": likeliest.any(dim=1).float()}
