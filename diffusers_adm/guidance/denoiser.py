"""Prediction of one run: the UNet, with classifier-free guidance and its relatives."""

import torch

from diffusers_adm.guidance.combination import GuiderCombination, WeightedCombination
from diffusers_adm.guidance.weaker import Predictions
from diffusers_adm.models import ADMUNet2DModel


class RunDenoiser:
    """
    Prediction epsilon(x_t, t), or x_0(x_t, sigma) with preconditioning, including guidance by a weaker prediction.

    Args:
        unet: UNet that predicts.
        class_labels: Class of each image, `(batch,)`, or `None`.
        low_res: Low-resolution images of an upsampler, `(batch, channels, any height, any width)`, or `None`.
        sigmas: Noise level of each step of the run.
        predicts_x_0: Whether the UNet predicts x_0, and not epsilon.
        predictions: Stronger and weaker prediction of a step. `None` means the prediction of the UNet alone.
        combination: Combination of the two predictions. It knows the steps at which it acts.
        epsilon_scales: Divisor of epsilon at each step of the run. `None` means that epsilon is not scaled.
    """

    def __init__(
        self,
        unet: ADMUNet2DModel,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        sigmas: list[float] | None = None,
        predicts_x_0: bool = False,
        predictions: Predictions | None = None,
        combination: WeightedCombination | GuiderCombination | None = None,
        epsilon_scales: list[float] | None = None,
    ):
        self.unet = unet
        self.class_labels = class_labels
        self.low_res = low_res
        self.sigmas = sigmas
        self.predicts_x_0 = predicts_x_0
        self.predictions = predictions
        self.combination = combination
        self.epsilon_scales = epsilon_scales
        self.told_sigma = unet.config.get("preconditioning") is not None
        self.dtypes: dict[int, torch.dtype] = {}

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        """
        Returns the UNet's output, `(batch, channels or 2 * channels, height, width)`, float32.

        Args:
            x_t: Noised images, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`, or its noise level for a UNet with preconditioning.
            step: Number of the step in the run.
        """
        if self.combination is None or not self.combination.acts(step):
            output = self.output(self.unet, x_t, timestep, self.class_labels, self.low_res)
        else:
            stronger, weaker = self.predictions(self, x_t, timestep, step)
            output = self.combination(self, stronger, weaker, x_t, step)
        return output if self.epsilon_scales is None else self._with_scaled_epsilon(output, x_t, step)

    def output(
        self,
        unet: ADMUNet2DModel,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the output of a UNet, `(batch, channels or 2 * channels, height, width)`, float32."""
        if self.told_sigma:
            model_input = x_t * (1 + timestep**2).sqrt()[:, None, None, None]  # x_0 + sigma * epsilon, in float32
        else:
            if id(unet) not in self.dtypes:  # read once per run, because a model walks over all its modules to find it
                self.dtypes[id(unet)] = unet.dtype
            model_input = x_t.to(self.dtypes[id(unet)])
        return unet(model_input, timestep, class_labels, low_res).sample.float()

    def x_0_and_epsilon(self, output: torch.Tensor, x_t: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the predicted x_0 and noise, both of the shape of `x_t`."""
        sigma, prediction = self.sigmas[step], output[:, : x_t.shape[1]]
        x = x_t * (1 + sigma**2) ** 0.5  # x_0 + sigma * epsilon
        if self.predicts_x_0:
            return prediction, (x - prediction) / sigma
        return x - sigma * prediction, prediction

    def _with_scaled_epsilon(self, output: torch.Tensor, x_t: torch.Tensor, step: int) -> torch.Tensor:
        sigma, channels = self.sigmas[step], x_t.shape[1]
        epsilon = self.x_0_and_epsilon(output, x_t, step)[1] / self.epsilon_scales[step]
        prediction = x_t * (1 + sigma**2) ** 0.5 - sigma * epsilon if self.predicts_x_0 else epsilon
        return torch.cat([prediction, output[:, channels:]], dim=1)
