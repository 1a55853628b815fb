"""Denoiser D(x; sigma) for toolboxes that bring their own samplers, such as deepinv, k-diffusion and InverseBench.

Notation: sigma is the noise level, x = x_0 + sigma * epsilon the noised image of Karras et al. 2022 (arXiv 2206.00364), and
x_t = x / sqrt(1 + sigma^2) the same image at the scale of Ho et al. 2020.
"""

import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler, SchedulerMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_adm.checks import check_images, check_types, one_per_image
from diffusers_adm.diffusion import NoiseSchedule, read_table, split_learned_variance, timestep_at
from diffusers_adm.guidance import ClassifierGuidance, combine_predictions, shortened
from diffusers_adm.guidance.gradient import FLOAT16_LOSS_SCALE
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.models.preconditioning import training_schedule
from diffusers_adm.pipelines import ClassifierGuidedPipeline
from diffusers_adm.pipelines.checks import check_classifier, check_parts, check_scheduler_fits
from diffusers_adm.pipelines.class_labels import ClassLabels, check_labels
from diffusers_adm.pipelines.options import per_image


class Denoiser(nn.Module):
    """
    Denoiser D(x; sigma) of an ADM model: the expected clean image of x = x_0 + sigma * epsilon (Karras et al. 2022, arXiv
    2206.00364, section 2). Gradients flow from the result to x.

    A UNet that is given timesteps is evaluated at the timestep of the same noise level, interpolated between two training
    timesteps. Above the highest noise level and below the lowest one, the nearest timestep is used.

    Args:
        model: Pipeline, or a UNet. A UNet that is given timesteps requires `scheduler` too.
        class_labels: Class of the images, by number or name: one for all images, or one per image. `None` for a UNet without
            classes or for its null class.
        guidance_scale: Scale s of classifier guidance, which adds s * grad log p(y | x) to the score (Dhariwal & Nichol 2021,
            arXiv 2105.05233, section 4). 0 means no guidance.
        cfg_weight: Weight w of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6). 0 means no guidance.
        max_x_0_shift: Largest root mean square by which classifier guidance moves an image's predicted x_0, which lies in [-1, 1].
            `None` means no limit.
        unit_range: Whether clean images lie in [0, 1] instead of [-1, 1]. Noise levels then refer to [0, 1] too.
        scheduler: Scheduler whose config describes the noise of a UNet that is given timesteps.

    Attributes:
        img_channels: Number of channels of the images.
        img_resolution: Height and width of the images in pixels.
        sigma_min: Lowest noise level of the training.
        sigma_max: Highest noise level of the training.

    Raises:
        ValueError: If a class is unknown, guidance lacks a classifier, a null class or labels, the scheduler or the classifier does not
            fit the UNet, or an argument has a wrong type.
    """

    def __init__(
        self,
        model: ClassifierGuidedPipeline | ADMUNet2DModel,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 0.0,
        cfg_weight: float = 0.0,
        max_x_0_shift: float | None = 0.5,
        unit_range: bool = False,
        scheduler: SchedulerMixin | None = None,
    ):
        super().__init__()
        numbers = {"guidance_scale": guidance_scale, "cfg_weight": cfg_weight, "max_x_0_shift": max_x_0_shift}
        check_types(type(self).__init__, {**numbers, "unit_range": unit_range})
        for name in ("guidance_scale", "cfg_weight"):
            per_image(numbers[name], 1, name)  # raises if the number is not finite
        self.pipeline = _as_pipeline(model, scheduler)
        self.unet, self.classifier = self.pipeline.unet, self.pipeline.classifier
        self.class_labels, self.unit_range = class_labels, unit_range
        self.guidance_scale, self.cfg_weight, self.max_x_0_shift = guidance_scale, cfg_weight, max_x_0_shift
        check_scheduler_fits(self.unet, self.pipeline.scheduler)
        self._check_guidance()
        config = self.unet.config
        self.given_sigma = config.get("preconditioning") is not None
        self.schedule = None if self.given_sigma else NoiseSchedule.from_config(self.pipeline.scheduler.config)
        self.classifier_schedule = self.schedule
        noise = {} if self.classifier is None else self.classifier.config
        if self.given_sigma and noise.get("beta_schedule") is not None:
            self.classifier_schedule = training_schedule(noise["num_train_timesteps"], noise["beta_schedule"])
        self.guidance = ClassifierGuidance(self.classifier)
        self.img_channels, self.img_resolution = config.in_channels, config.sample_size
        levels = (config.sigma_min, config.sigma_max) if self.given_sigma else self.schedule.sigma[[0, -1]].tolist()
        self.sigma_min, self.sigma_max = (level / 2 if unit_range else level for level in levels)
        if class_labels is not None:
            self._labels(class_labels, None)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: ClassLabels | None = None
    ) -> torch.Tensor:
        """
        Returns the denoised images D(x; sigma), of the shape and dtype of `x`.

        Args:
            x: Noised images x_0 + sigma * epsilon, `(batch, channels, height, width)`.
            sigma: Noise level, at least 0: one for all images, or one per image.
            class_labels: Classes in place of the constructor's.

        Raises:
            ValueError: If a noise level is negative, or a class is unknown, or an argument has a wrong type or shape.
        """
        return self._predict(x, sigma, class_labels)[0]

    def mean_and_variance(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: ClassLabels | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns mean and variance of each pixel of the clean image, given the noised image. Both have the shape of `x`. The mean is
        D(x; sigma). The variance of x_0 follows from the learned variance of the step p(x_{t-1} | x_t), because the mean of the
        step is linear in x_0 (Ho et al. 2020, eq. 7). Between two timesteps, the logarithm of the variance is interpolated.
        Guidance does not change the variance.

        Args:
            x: Noised images x_0 + sigma * epsilon, `(batch, channels, height, width)`.
            sigma: Noise level, at least 0: one for all images, or one per image.
            class_labels: Classes in place of the constructor's.

        Raises:
            ValueError: If the UNet has no learned variance, or in the cases of `forward`.
        """
        if self.given_sigma or not self.unet.learns_variance:
            raise ValueError(
                "`mean_and_variance` requires a UNet with learned variance, but this one predicts the mean alone."
            )
        mean, timestep, variance_interpolation = self._predict(x, sigma, class_labels)
        below = timestep.floor().long().clamp(max=len(self.schedule) - 2)  # (batch,)
        fraction = (timestep - below)[:, None, None, None]
        variances = [x_0_variance(self.schedule, below + step, variance_interpolation) for step in (0, 1)]
        smallest = torch.finfo(torch.float32).tiny  # a variance of 0 has no logarithm
        low, high = (variance.clamp(min=smallest).log() for variance in variances)
        variance = torch.lerp(low, high, fraction).exp() / (4 if self.unit_range else 1)
        return mean, variance.to(x.dtype)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Returns the noise level unchanged, because all noise levels are supported. Samplers of the EDM family call this method."""
        return torch.as_tensor(sigma)

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: ClassLabels | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns D(x; sigma), the timestep of each image, `(batch,)`, and the learned variance's interpolation."""
        check_images("x", x, self.img_channels)
        labels = self._labels(class_labels, x)
        sigma = self._sigma(sigma, x)  # (batch,)
        scaled = 2 * x - 1 if self.unit_range else x
        sigma = 2 * sigma if self.unit_range else sigma
        level = sigma.to(torch.promote_types(x.dtype, torch.float32))[:, None, None, None]
        x_t = (scaled / (1 + level**2).sqrt()).float()
        if self.given_sigma:
            timestep, variance_interpolation = None, None
            x_0 = self._output(scaled, sigma, labels)
        else:
            timestep = timestep_at(self.schedule, sigma)
            prediction, variance_interpolation = split_learned_variance(
                self._output(x_t, timestep, labels), self.img_channels
            )
            predicts_epsilon = self.pipeline.scheduler.config.prediction_type == "epsilon"
            x_0 = scaled - level * prediction if predicts_epsilon else prediction
        if self.guidance_scale:
            x_0 = x_0 + self._shift(x_t, sigma, x_0, labels)
        denoised = (x_0 + 1) / 2 if self.unit_range else x_0
        return denoised.to(x.dtype), timestep, variance_interpolation

    def _output(self, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Returns the UNet's output with classifier-free guidance, `(batch, channels or 2 * channels, height, width)`, float32."""
        if self.unet.config.num_class_embeds is None:
            labels = None
        model_input = model_input.to(torch.float32 if self.given_sigma else self.unet.dtype)
        output = self.unet(model_input, timestep, labels).sample.float()
        if not self.cfg_weight:
            return output
        weaker = self.unet(model_input, timestep, torch.full_like(labels, self.unet.null_class)).sample.float()
        return combine_predictions(output, weaker, self.cfg_weight, self.img_channels)

    def _shift(self, x_t: torch.Tensor, sigma: torch.Tensor, x_0: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns sigma^2 * s * grad log p(y | x), by which guidance moves x_0, `(batch, channels, height, width)`."""
        guidance, timestep = self.guidance, timestep_at(self.classifier_schedule, sigma)
        loss_scale = FLOAT16_LOSS_SCALE if guidance.dtype == torch.float16 else 1.0
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
            gradient = torch.func.grad(lambda image: loss_scale * guidance(image, timestep, x_0, labels).sum())(x_t)
        sigma = sigma[:, None, None, None]
        # The gradient is with respect to x_t = x / sqrt(1 + sigma^2).
        shift = gradient * (self.guidance_scale / loss_scale * sigma**2 / (1 + sigma**2).sqrt())
        return shift if self.max_x_0_shift is None else shortened(shift, self.max_x_0_shift)

    def _labels(self, class_labels: ClassLabels | None, x: torch.Tensor | None) -> torch.Tensor | None:
        """Checks the classes. Returns the class of each image, `(batch,)`, or `None`."""
        class_labels = self.class_labels if class_labels is None else class_labels
        if class_labels is None:
            classes = self.unet.config.num_class_embeds is not None and self.unet.null_class is None
            if classes or self.guidance_scale or self.cfg_weight:
                raise ValueError("`class_labels` must be given, because the UNet or the guidance requires them.")
            return None
        on_cpu = not isinstance(class_labels, torch.Tensor) or class_labels.device.type == "cpu"
        if x is None or on_cpu:  # reading a tensor on a GPU would wait for it
            class_labels = self.pipeline.class_ids(class_labels)
            takes_labels = self.unet.config.num_class_embeds is not None
            check_labels(self.pipeline, class_labels, takes_labels, [self.guidance_scale] * len(class_labels))
        return None if x is None else one_per_image("class_labels", class_labels, x).expand(len(x))

    def _sigma(self, sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
        flat = sigma.flatten() if isinstance(sigma, torch.Tensor) else sigma  # some samplers pass (batch, 1, 1, 1)
        levels = one_per_image("sigma", flat, x).float().expand(len(x))
        if (
            levels.device.type == "cpu" and not ((levels >= 0) & levels.isfinite()).all()
        ):  # reading a tensor on a GPU would wait for it
            raise ValueError(f"`sigma` must be at least 0 and finite, but got {levels.tolist()}.")
        return levels

    def _check_guidance(self) -> None:
        if self.unet.config.low_res_conditioning:
            raise ValueError("`model` must not be an upsampler, because D(x; sigma) has no second input.")
        if self.guidance_scale and self.classifier is None:
            raise ValueError(f"guidance_scale={self.guidance_scale} requires a pipeline with a classifier.")
        if self.guidance_scale:
            check_classifier(self.pipeline)
        if self.cfg_weight and self.unet.null_class is None:
            raise ValueError(f"cfg_weight={self.cfg_weight} requires a UNet with a null class (use_null_class).")
        if self.max_x_0_shift is not None and not self.max_x_0_shift > 0:
            raise ValueError(f"`max_x_0_shift` must be above 0 or None, but got {self.max_x_0_shift}.")


def x_0_variance(schedule: NoiseSchedule, index: torch.Tensor, variance_interpolation: torch.Tensor) -> torch.Tensor:
    """
    Returns the variance of x_0 that explains the learned variance of p(x_{t-1} | x_t), `(batch, channels, height, width)`. It is
    (learned variance - posterior variance) / c^2, but at least 0. Here c is the coefficient of x_0 in the posterior mean (Ho et al.
    2020, eq. 7).

    Args:
        schedule: Steps of the process.
        index: Step of each image, `(batch,)`.
        variance_interpolation: Second half of the network's output, `(batch, channels, height, width)`.
    """
    lower = read_table(schedule.posterior_log_variance, index, variance_interpolation)
    width = read_table(schedule.log_beta - schedule.posterior_log_variance, index, variance_interpolation)
    # The lower bound is the posterior variance itself, except at step 0. Their difference is taken in float64.
    offset = read_table(
        schedule.posterior_log_variance.exp() - schedule.posterior_variance, index, variance_interpolation
    )
    explained = lower.exp() * torch.expm1((variance_interpolation + 1) / 2 * width) + offset
    return explained.clamp(min=0) / read_table(schedule.posterior_mean_x0, index, variance_interpolation) ** 2


def _as_pipeline(
    model: ClassifierGuidedPipeline | ADMUNet2DModel, scheduler: SchedulerMixin | None
) -> ClassifierGuidedPipeline:
    """Returns the pipeline, or one around the UNet."""
    if isinstance(model, DiffusionPipeline):
        if scheduler is not None:
            raise ValueError("`scheduler` must be None for a pipeline, because a pipeline has its own scheduler.")
        return model
    check_parts(model, None)
    if scheduler is None and model.config.get("preconditioning") is not None:
        scheduler = HeunDiscreteScheduler()  # not used, because the UNet is given the noise level itself
    if scheduler is None:
        raise ValueError(
            "`scheduler` is required with a UNet, because the noise levels of its timesteps are in the scheduler's config."
        )
    return ClassifierGuidedPipeline(model, scheduler)
