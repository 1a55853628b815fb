"""Denoiser of one run: the UNet, with classifier-free guidance or autoguidance if they are on."""

import torch

from diffusers_adm.models import ADMUNet2DModel


class Denoiser:
    """
    UNet of one run, with classifier-free guidance or autoguidance if they are on. It predicts epsilon from x_t and t. With
    preconditioning, it predicts x_0 from x_t and sigma.

    Args:
        unet: UNet of the pipeline.
        class_labels: Class of each image, `(batch,)`, or `None`.
        low_res: Low-resolution images of an upsampler, `(batch, channels, any height, any width)`, or `None`.
        cfg_weight: Weight w of each image, `(batch, 1, 1, 1)`. `None` turns guidance off.
        factors: Factor of the weight at each step of the run. It is 0 at steps without guidance.
        guiding_unet: UNet that makes the weaker prediction. `None` means the UNet itself, with the null class.
    """

    def __init__(
        self,
        unet: ADMUNet2DModel,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        cfg_weight: torch.Tensor | None = None,
        factors: list[float] | None = None,
        guiding_unet: ADMUNet2DModel | None = None,
    ):
        self.unet = unet
        self.class_labels = class_labels
        self.low_res = low_res
        self.cfg_weight = cfg_weight
        self.factors = factors
        self.guiding_unet = guiding_unet
        self.takes_sigma = unet.config.get("preconditioning") is not None
        # Read once per run, because a model walks over all its modules to find its dtype.
        self.dtype = unet.dtype
        self.guiding_dtype = None if guiding_unet is None else guiding_unet.dtype

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        """
        Returns the UNet's output, `(batch, channels or 2 * channels, height, width)`, float32.

        Args:
            x_t: Noised images, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`, or its noise level for a UNet with preconditioning.
            step: Number of the step in the run.
        """
        model_input = self._model_input(x_t, timestep, self.dtype)
        if self.cfg_weight is None or not self.factors[step]:
            return self.unet(model_input, timestep, self.class_labels, self.low_res).sample.float()
        if self.guiding_unet is None:
            output, weaker = self._with_and_without_class(model_input, timestep)
        else:
            output = self.unet(model_input, timestep, self.class_labels, self.low_res).sample.float()
            weaker = self._guiding_output(x_t, timestep)
        return combine_predictions(output, weaker, self.cfg_weight * self.factors[step], x_t.shape[1])

    def _model_input(self, x_t: torch.Tensor, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self.takes_sigma:
            return x_t.to(dtype)
        return x_t * (1 + timestep**2).sqrt()[:, None, None, None]  # x_0 + sigma * epsilon, in float32

    def _with_and_without_class(
        self, model_input: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output with the class and the output with the null class, from one batch of twice the size."""
        both = self.unet(
            torch.cat([model_input, model_input]),
            torch.cat([timestep, timestep]),
            torch.cat([self.class_labels, torch.full_like(self.class_labels, self.unet.null_class)]),
            None if self.low_res is None else torch.cat([self.low_res, self.low_res]),
        ).sample.float()  # (2 * batch, channels or 2 * channels, height, width)
        return both.chunk(2)

    def _guiding_output(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        labels = self.class_labels if self.guiding_unet.config.num_class_embeds is not None else None
        model_input = self._model_input(x_t, timestep, self.guiding_dtype)
        return self.guiding_unet(model_input, timestep, labels, self.low_res).sample.float()


def combine_predictions(
    prediction: torch.Tensor, weaker: torch.Tensor, weight: torch.Tensor | float, channels: int
) -> torch.Tensor:
    """
    Returns (1 + w) * prediction - w * weaker. This is classifier-free guidance if the weaker output is for the null class (Ho &
    Salimans 2022, arXiv 2207.12598, eq. 6). It is autoguidance if a worse network made the weaker output (Karras et al. 2024, arXiv
    2406.02507).

    Args:
        prediction: Stronger output, `(batch, channels or 2 * channels, height, width)`. Its learned variance is returned unchanged.
        weaker: Weaker output, of the same shape.
        weight: Weight w, one number or `(batch, 1, 1, 1)`.
        channels: Number of channels of the images.
    """
    combined = (1 + weight) * prediction[:, :channels] - weight * weaker[:, :channels]
    return torch.cat([combined, prediction[:, channels:]], dim=1)
