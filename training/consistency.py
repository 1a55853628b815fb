"""Consistency tuning (Geng et al. 2024, arXiv 2406.14548), and distillation of a guided teacher.

A consistency model f(x; sigma) predicts the same x_0 at all noise levels of a path. A pair of noise levels sigma > r gives the loss
|f(x_sigma; sigma) - f(x_r; r)|, whose second term is the target. Training begins with r = sigma_min, where f(x; r) = x, and moves r
towards sigma. Without a teacher, both points have the same x_0 and the same noise. With one, x_r is where the steps of the guided
teacher lead from x_sigma.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import CMStochasticIterativeScheduler
from torch import nn

from diffusers_adm.choices import BETA_SCHEDULES
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.denoiser import Denoiser
from diffusers_adm.diffusion import NoiseSchedule, timestep_at
from diffusers_adm.losses import consistency_loss
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.models.class_names import check_same_classes
from diffusers_adm.pipelines import ClassifierGuidedPipeline
from diffusers_adm.pipelines.class_labels import known_classes, known_names
from diffusers_adm.pipelines.released import name_of_released
from diffusers_adm.records import as_record, weights_digest
from diffusers_adm.shipped import name_or_folder
from diffusers_adm.solvers.clipping import clip_range
from diffusers_adm.training.consistency_options import ConsistencyOptions, ConsistencyTrainingOptions
from diffusers_adm.training.objective import LossTerms
from diffusers_adm.training.setup import model_config


# Largest number of times that the distance of a pair is halved. Float32 could not tell much closer levels apart.
MOST_HALVINGS = 10
# That of held-out losses, as at the end of a training with the default of --closer_every.
HELD_OUT_HALVINGS = 7
NUM_LEVELS = 40  # noise levels of the scheduler, as in Song et al. 2023, section 6
RHO = 7  # spacing of the noise levels of a teacher that is given them [Karras et al. 2022, eq. 5]

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_consistency_unet(options: ConsistencyTrainingOptions, num_classes: int | None) -> ADMUNet2DModel:
    """Builds the consistency model of the options with random weights."""
    levels, diffusion = options.consistency, options.diffusion
    given_timestep = levels.noise_embedding == "timestep"
    return ADMUNet2DModel(
        out_channels=options.format.in_channels,
        num_class_embeds=num_classes,
        use_null_class=options.classes.label_dropout > 0,
        upsample_type=options.architecture.resample_type,
        preconditioning="consistency",
        sigma_data=levels.sigma_data,
        sigma_min=levels.sigma_min,
        sigma_max=levels.sigma_max,
        beta_schedule=BETA_SCHEDULES[diffusion.noise_schedule] if given_timestep else None,
        num_train_timesteps=diffusion.num_train_timesteps,
        **model_config(options.architecture, options.format),
    )


def consistency_pipeline(
    options: ConsistencyTrainingOptions, unet: ADMUNet2DModel, names: list[str] | None
) -> ClassifierGuidedPipeline:
    """Builds the pipeline of a consistency model, which draws in one or two steps and without a classifier."""
    levels, chosen = options.consistency, options.teacher.path_levels
    number, rho, steps = NUM_LEVELS, levels.sampling_rho, 2
    if chosen is not None:  # the last level is sigma_min, where a step changes nothing, and more steps are refused
        number, steps = len(chosen) + 1, len(chosen)
        rho = spacing_through(levels.sigma_min, chosen[1], chosen[0]) if steps == 2 else rho
    scheduler = CMStochasticIterativeScheduler(number, levels.sigma_min, levels.sigma_max, rho=rho)
    id2label = dict(enumerate(names)) if names else None
    settings = {"guidance_scale": 0.0, "num_inference_steps": steps}
    return ClassifierGuidedPipeline(unet, scheduler, id2label=id2label, **settings)


def spacing_through(lowest: float, middle: float, highest: float) -> float:
    """Returns the rho of Karras et al. 2022, eq. 5, with which `middle` is the middle one of three noise levels."""
    ends = [math.log(end / middle) for end in (lowest, highest)]

    def log_middle(inverse: float) -> float:
        """Logarithm of the middle level, relative to `middle`, for 1 / rho."""
        powers = [inverse * end for end in ends]
        largest = max(powers)
        return (largest + math.log(sum(math.exp(power - largest) for power in powers) / 2)) / inverse

    below, above = -1e4, 1e4 + 1  # of 1 / rho, with which the middle level grows. Bisection does not meet 0
    for _ in range(100):
        inverse = (below + above) / 2
        below, above = (inverse, above) if log_middle(inverse) < 0 else (below, inverse)
    return 1 / inverse


class Teacher:
    """
    Guided prediction of a pipeline.

    Args:
        options: Options of the run.
        images: Training images.
        accelerator: Accelerator of the script.

    Attributes:
        guidance_scale: Scale of classifier guidance.
        takes_labels: Whether the teacher is given the labels of the images.
        schedule: Noise schedule of a UNet that is given timesteps, or `None`.
    Raises:
        ValueError: If the pipeline cannot be loaded, is a consistency model, draws images of another size or of other classes, or lacks
            what its guidance requires.
        OSError: If the pipeline does not exist.
    """

    def __init__(
        self, options: ConsistencyTrainingOptions, images: LabelledImages | StreamedImages, accelerator: Accelerator
    ):
        name = options.teacher.teacher_model_name_or_path
        released = name_of_released(name)
        load = ClassifierGuidedPipeline.from_pretrained if released is None else ClassifierGuidedPipeline.from_released
        pipeline = load(name_or_folder(name) if released is None else released)
        size = {"in_channels": options.format.in_channels, "sample_size": options.format.resolution}
        theirs = {option: pipeline.unet.config[option] for option in size}
        if theirs != size:
            raise ValueError(f"--teacher_model_name_or_path {name} must draw images of {size}, but draws {theirs}.")
        if pipeline.unet.config.get("preconditioning") == "consistency":
            raise ValueError(
                f"--teacher_model_name_or_path {name} must not be a consistency model, which predicts the end of a path instead of the"
                " expected image."
            )
        scale = options.teacher.guidance_scale
        if scale is None:
            scale = 0.0 if pipeline.classifier is None else pipeline.config.guidance_scale
        guidance = {"guidance_scale": scale, "cfg_weight": options.teacher.cfg_weight}
        _check_classes_of_teacher(name, pipeline, images.class_names, any(guidance.values()))
        self.accelerator = accelerator
        self.guidance_scale = scale
        self.clip_range = clip_range(pipeline.scheduler)
        self.takes_labels = images.class_names is not None and known_classes(pipeline) is not None
        self.pipeline = pipeline
        labels = 0 if self.takes_labels else None
        self.denoiser = Denoiser(pipeline.to(accelerator.device), labels, **guidance)
        self.schedule = self.denoiser.schedule

    def record(self) -> dict[str, Any]:
        """Returns a hash of the weights, and the scheduler's config, as JSON."""
        scheduler = {name: value for name, value in self.pipeline.scheduler.config.items() if not name.startswith("_")}
        return {"weights": weights_digest(self.pipeline.components), "scheduler": as_record(scheduler)}

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """
        Returns the guided prediction of x_0, of the shape of `x`. It is clipped if the pipeline's scheduler clips. Unlike in sampling, it
        is clipped after guidance, because it is a target.

        Args:
            x: Noised images x_0 + sigma * epsilon, `(batch, channels, height, width)`.
            sigma: Noise level of each image, `(batch,)`.
            labels: Class of each image, `(batch,)`.
        """
        with self.accelerator.autocast():
            x_0 = self.denoiser(x, sigma, labels if self.takes_labels else None)
        return x_0 if self.clip_range is None else x_0.clamp(-self.clip_range, self.clip_range)


def _check_classes_of_teacher(
    name: str, pipeline: ClassifierGuidedPipeline, class_names: list[str] | None, guided: bool
) -> None:
    """Raises a ValueError unless the teacher can be given the labels of the images."""
    unet, num_classes = pipeline.unet, known_classes(pipeline)
    if class_names is None:
        if guided or (unet.config.num_class_embeds is not None and unet.null_class is None):
            raise ValueError(f"--teacher_model_name_or_path {name} requires labels, but the images have none.")
        return
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(
            f"--teacher_model_name_or_path {name} must have the {len(class_names)} classes of the images, but has {num_classes}."
        )
    names = known_names(pipeline)
    if names is not None:
        check_same_classes(dict(enumerate(class_names)), names)


def rank_of_level(sigma: torch.Tensor, levels: ConsistencyOptions, num_ranks: int) -> torch.Tensor:
    """Returns the rank of noise levels among `num_ranks` levels, evenly spaced in log(sigma), `(batch,)`."""
    lowest, highest = math.log(levels.sigma_min), math.log(levels.sigma_max)
    return (num_ranks * (sigma.log() - lowest) / (highest - lowest)).long().clamp(0, num_ranks - 1)


class StoredPathObjective:
    """
    Computes the loss of a consistency model at points of stored paths.

    Args:
        options: Options of the run.
        conditions: Function that returns the UNet's arguments for a batch, without the noised images and their noise levels.
    """

    sampler = None

    def __init__(self, options: ConsistencyTrainingOptions, conditions: Callable[[dict], dict]):
        self.levels = options.consistency
        self.num_ranks = options.diffusion.num_train_timesteps
        self.conditions = conditions

    def __call__(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the loss at the points of a batch."""
        sigma, lowest = batch["sigma"], torch.full_like(batch["sigma"], self.levels.sigma_min)  # (batch,)
        predicted = model(batch["image"], sigma, **self.conditions(batch)).sample
        loss = consistency_loss(predicted, batch["target"], sigma, lowest, self.levels.sigma_data)
        return LossTerms(loss, {}, rank_of_level(sigma, self.levels, self.num_ranks))

    held_out_terms = __call__


class ConsistencyObjective:
    """
    Noises images at random noise levels and computes the loss of a consistency model.

    Args:
        options: Options of the run.
        conditions: Function that returns the UNet's arguments for a batch, without the noised images and their noise levels.
        step: Function that returns the number of optimizer steps so far.
        teacher: Guided prediction of x_0, a function of x, sigma and labels. `None` to learn from the images alone.
    """

    sampler = None

    def __init__(
        self,
        options: ConsistencyTrainingOptions,
        conditions: Callable[[dict], dict],
        step: Callable[[], int],
        teacher: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
    ):
        self.levels = options.consistency
        self.num_path_steps = options.teacher.teacher_steps
        self.closer_every = self.levels.closer_every
        self.num_ranks = options.diffusion.num_train_timesteps
        self.conditions = conditions
        self.step = step
        self.teacher = teacher

    def __call__(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the loss at randomly drawn pairs of noise levels, whose distance depends on the step."""
        return self.terms(model, batch, self.halvings(self.step()))

    def held_out_terms(self, model: nn.Module, batch: dict) -> LossTerms:
        """Computes the loss at pairs whose distance does not depend on the step, so that losses of all steps can be compared."""
        return self.terms(model, batch, HELD_OUT_HALVINGS)

    def halvings(self, step: int) -> int:
        """Returns how often the distance of pairs has been halved before a step."""
        return min(step // self.closer_every, MOST_HALVINGS)

    def terms(self, model: nn.Module, batch: dict, halvings: int) -> LossTerms:
        """Computes the loss at randomly drawn pairs of noise levels, whose distance has been halved some times."""
        x_0, levels = batch["image"], self.levels  # (batch, channels, resolution, resolution)
        sigma = first_levels(levels, torch.randn(len(x_0), device=x_0.device, dtype=x_0.dtype))  # (batch,)
        spacing = getattr(self.teacher, "schedule", None)
        path = path_levels(
            sigma, self.lower_level(sigma, halvings), self.num_path_steps, spacing
        )  # (steps + 1, batch)
        points = self.points(batch, path)  # (steps + 1, batch, channels, resolution, resolution)
        conditions = self.conditions(batch)
        if halvings == 0:  # all lower levels are sigma_min, where the model returns its input
            target = points[-1]
        else:
            with torch.no_grad():
                target = model(points[-1], path[-1], **conditions).sample
        repeated = {name: value.repeat(self.num_path_steps) for name, value in conditions.items()}
        predicted = model(points[:-1].flatten(0, 1), path[:-1].flatten(), **repeated).sample
        targets, ends = target.repeat(self.num_path_steps, 1, 1, 1), path[-1].repeat(self.num_path_steps)
        loss = consistency_loss(predicted, targets, path[:-1].flatten(), ends, levels.sigma_data)
        return LossTerms(
            loss.unflatten(0, (self.num_path_steps, -1)).mean(dim=0), {}, rank_of_level(sigma, levels, self.num_ranks)
        )

    def lower_level(self, sigma: torch.Tensor, halvings: int) -> torch.Tensor:
        """Returns the lower noise level of each pair, `(batch,)` [Geng et al. 2024, section 3]."""
        distance = (1 + 8 * torch.sigmoid(-sigma)) / 2**halvings
        return (sigma * (1 - distance)).clamp(min=self.levels.sigma_min)

    def points(self, batch: dict, path: torch.Tensor) -> torch.Tensor:
        """
        Returns noised images at the noise levels of a path, `(steps + 1, batch, channels, height, width)`.

        Args:
            batch: Images, and their labels.
            path: Noise levels of each image, highest first, `(steps + 1, batch)`.
        """
        x_0 = batch["image"]
        noise = torch.randn_like(x_0)
        if self.teacher is None:
            return x_0 + path[:, :, None, None, None] * noise
        x = x_0 + path[0][:, None, None, None] * noise
        with torch.no_grad():
            return follow(lambda x, sigma: self.teacher(x, sigma, batch.get("label")), x, path)


def first_levels(levels: ConsistencyOptions, deviations: torch.Tensor) -> torch.Tensor:
    """Returns the higher noise level of each pair, `(batch,)`, given numbers that are normally distributed, `(batch,)`."""
    sigma = (levels.log_sigma_mean + levels.log_sigma_std * deviations).exp()
    return sigma.clamp(2 * levels.sigma_min, levels.sigma_max)


def path_levels(
    sigma: torch.Tensor, lower: torch.Tensor, num_steps: int, schedule: NoiseSchedule | None = None
) -> torch.Tensor:
    """
    Returns the noise levels of a path, highest first, `(num_steps + 1, batch)`. Their timesteps are evenly spaced.

    Args:
        sigma: First noise level of each image, `(batch,)`.
        lower: Last noise level of each image, `(batch,)`.
        num_steps: Number of steps between both.
        schedule: Noise schedule of the timesteps. Without one, the spacing is that of Karras et al. 2022, eq. 5.
    """
    ramp = torch.linspace(0, 1, num_steps + 1, device=sigma.device, dtype=sigma.dtype)[1:-1, None]
    between = torch.lerp(sigma[None] ** (1 / RHO), lower[None] ** (1 / RHO), ramp) ** RHO  # (num_steps - 1, batch)
    if schedule is not None:
        ends = (timestep_at(schedule, level).to(sigma.dtype)[None] for level in (sigma, lower))
        spaced = sigma_at(schedule, torch.lerp(*ends, ramp))  # (num_steps - 1, batch)
        # Below the schedule, all levels have the lowest timestep, and above it the highest one, but the levels of a path must differ.
        lowest, highest = schedule.sigma[[0, -1]].tolist()
        between = torch.where((sigma > lowest) & (lower < highest), spaced, between)
    return torch.cat([sigma[None], between, lower[None]])


def sigma_at(schedule: NoiseSchedule, timestep: torch.Tensor) -> torch.Tensor:
    """Returns the noise level at timesteps, of their shape. Between two steps of the schedule, log(sigma) is interpolated."""
    log_sigma = schedule.sigma.log().to(timestep.dtype).to(timestep.device, non_blocking=timestep.is_cuda)
    below = timestep.long().clamp(max=len(log_sigma) - 2)
    return torch.lerp(log_sigma[below], log_sigma[below + 1], timestep - below).exp()


def follow(denoise: Denoise, x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """
    Takes the steps of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2). The first and the last step are of Euler's
    method, because the last one covers so many noise levels that the second order would overshoot.

    Args:
        denoise: Prediction of x_0, a function of x and sigma.
        x: Noised images at the first noise levels, `(batch, channels, height, width)`.
        path: Noise levels of each image, highest first, `(steps + 1, batch)`.

    Returns:
        Noised images at all noise levels of the path, `(steps + 1, batch, channels, height, width)`.
    """
    points, before = [x], None
    for step, (sigma, target) in enumerate(zip(path[:-1], path[1:])):
        x_0 = denoise(points[-1], sigma)
        extrapolated = x_0
        if before is not None and step < len(path) - 2:
            share = (sigma / target).log() / (2 * (path[step - 1] / sigma).log())  # (batch,)
            extrapolated = x_0 + share[:, None, None, None] * (x_0 - before)
        remaining = (target / sigma)[:, None, None, None]
        points.append(remaining * points[-1] + (1 - remaining) * extrapolated)
        before = x_0
    return torch.stack(points)
