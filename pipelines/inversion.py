"""Predictions of a pipeline's UNet for given images, and inversion of images to noise."""

import torch
from diffusers import DDIMScheduler

from diffusers_adm.checks import one_per_image
from diffusers_adm.diffusion import NoiseSchedule, Prediction, add_noise, epsilon_from_x_0, read_prediction
from diffusers_adm.guidance import RunDenoiser
from diffusers_adm.guidance.gradient import keeping_weights, moves_weights
from diffusers_adm.pipelines.beginning import step_at
from diffusers_adm.pipelines.checks import check_data, check_eval_mode, check_finite, check_takes_timesteps
from diffusers_adm.pipelines.class_labels import ClassLabels, check_labels
from diffusers_adm.solvers import build_solver, full_config
from diffusers_adm.solvers.algorithms import check_variance_type


# Drawn images may exceed 1 a little if they are not clipped. Pixels in 0 ... 255 are far above it.
LARGEST_PIXEL = 10.0


class InversionMixin:
    """Predictions and inversion of a `DiffusionPipeline` with an ADM UNet."""

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        class_labels: ClassLabels | None = None,
        low_res: torch.Tensor | None = None,
    ) -> Prediction:
        """
        Returns the prediction of the UNet for noised images. Gradients with respect to the images flow through it, so you can compute
        losses on it, such as those of inverse problems. The weights need no gradient. Nothing is sampled.

        Args:
            sample: Noised images x_t, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`, or one for all images.
            class_labels: Class of each image, by number or name. `None` for a UNet without classes, or for the null class.
            low_res: Low-resolution images in [-1, 1], `(batch, channels, any height, any width)`, for an upsampler.

        Raises:
            ValueError: If a timestep or class does not exist, the number of timesteps or classes is not that of the images, or images
                have a wrong type or shape.
        """
        check_takes_timesteps(self.unet, "predict")
        schedule = NoiseSchedule.from_config(self.scheduler.config)
        sample, labels, low_res = self._prepare_images("sample", sample, class_labels, low_res)
        timestep = one_per_image("timestep", timestep, sample).expand(len(sample))  # (batch,)
        if timestep.is_floating_point() or not ((0 <= timestep) & (timestep < len(schedule))).all():
            raise ValueError(f"`timestep` must be integers in [0, {len(schedule) - 1}], but got {timestep.tolist()}.")
        with keeping_weights(sample.requires_grad and moves_weights(self.unet)):
            model_output = self.unet(sample.to(self.unet.dtype), timestep, labels, low_res).sample
        config = self.scheduler.config
        variance_type = config.get("variance_type") or "fixed_large"
        check_variance_type(variance_type)
        return read_prediction(schedule, sample, timestep, model_output, config.prediction_type, variance_type)

    def _prepare_images(
        self, name: str, images: torch.Tensor, class_labels: ClassLabels | None, low_res: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Checks images, their labels and their low-resolution images. Returns them on the device of the pipeline, the labels as numbers,
        `(batch,)`.
        """
        for argument, given in ((name, images), ("low_res", low_res)):
            if argument == name or given is not None:
                check_data(argument, given, self.unet.config.in_channels)
        device = self._execution_device
        images, low_res = images.to(device), None if low_res is None else low_res.to(device)
        if class_labels is None:
            return images, None, low_res
        labels = self.class_ids(class_labels)
        if len(labels) != len(images):
            raise ValueError(f"`class_labels` must have one label per image, {len(images)}, but got {len(labels)}.")
        check_labels(self, labels, unet_takes_labels=True)
        return images, torch.tensor(labels, device=device), low_res

    @torch.no_grad()
    def invert(
        self,
        images: torch.Tensor,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 250,
        low_res: torch.Tensor | None = None,
        until: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Returns the noise x_T from which DDIM draws given images, by running its ODE in reverse (Dhariwal & Nichol 2021, appendix F). To
        draw the images again, pass the noise as `latents`, with a `DDIMScheduler`, the same labels and steps, and no guidance.

        With `until`, the images keep more of their content: they are noised only up to that timestep. To draw the images again, also
        pass it as `start`.

        Args:
            images: Clean images x_0 in [-1, 1], `(batch, channels, height, width)`.
            class_labels: Class of each image, by number or name. `None` for a UNet without classes, or for the null class.
            num_inference_steps: Number of steps of DDIM. With more steps, the images that are drawn again are closer to `images`.
            low_res: Low-resolution images in [-1, 1], `(batch, channels, any height, any width)`, for an upsampler.
            until: Training timestep at which inversion ends. It ends at the highest visited timestep that is at most `until`. `None`
                means the last one.

        Returns:
            Noise x_T, or noised images x_t, of the shape of `images`.

        Raises:
            ValueError: If the number of steps is out of its range, `until` is not a timestep or below all visited ones, a class does
                not exist, images have a wrong type or shape, or the noise is not finite.
        """
        check_takes_timesteps(self.unet, "invert")
        check_eval_mode({"unet": self.unet})
        x, labels, low_res = self._prepare_images("images", images, class_labels, low_res)
        if not len(images):
            raise ValueError("`images` must be one or more images, but got none.")
        largest = images.abs().max().item()
        if not largest <= LARGEST_PIXEL:
            raise ValueError(f"`images` must be in [-1, 1], but got values up to {largest:.4g}.")
        scheduler = DDIMScheduler.from_config(full_config(self.scheduler))
        solver = build_solver(scheduler, num_inference_steps, None, 0.0)
        if until is not None:
            solver.begin_at(step_at(self, solver, "until", until))
        schedule, steps = solver.schedule, list(enumerate(solver.visits))
        denoiser = RunDenoiser(self.unet, solver, labels, low_res)
        timesteps = schedule.timesteps.to(x.device)[:, None].expand(-1, len(x))  # (steps, batch), least noisy first
        x = x.float()
        # Each step uses the noise that is predicted before it. The step from the clean images uses the noise of the first timestep.
        last, _ = steps[-1]
        _, epsilon = denoiser.x_0_and_epsilon(denoiser(x, timesteps[0], last), x, last)
        x = add_noise(schedule, x, 0, epsilon)
        for step, index in reversed(steps[1:]):
            # Clipped or thresholded as in sampling, because the steps must be its reverse.
            x_0 = solver.predict(denoiser(x, timesteps[index], step), index, x).x_0
            x_0 = scheduler._threshold_sample(x_0) if solver.thresholds else x_0
            x = add_noise(schedule, x_0, index + 1, epsilon_from_x_0(schedule, x, index, x_0))
        check_finite(x)
        return x
