"""Prediction of one run: the UNet, with classifier-free guidance and its relatives."""

import torch

from diffusers_adm.diffusion import epsilon_from_x_0, x_0_from_epsilon, x_0_from_prediction
from diffusers_adm.guidance.combination import GuiderCombination, WeightedCombination
from diffusers_adm.guidance.gradient import recomputed
from diffusers_adm.guidance.weaker import Predictions
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.solvers import Solver


class RunDenoiser:
    """
    Prediction epsilon(x_t, t), or x_0(x_t, sigma) with preconditioning, including guidance by a weaker prediction.

    Args:
        unet: UNet that predicts.
        solver: Solver of the run.
        class_labels: Class of each image, `(batch,)`, or `None`.
        low_res: Low-resolution images of an upsampler, `(batch, channels, any height, any width)`, or `None`.
        predictions: Stronger and weaker prediction of a step. `None` means the prediction of the UNet alone.
        combination: Combination of the two predictions. It knows the steps at which it acts.
        epsilon_scales: Divisor of epsilon at each step of the run. `None` means that epsilon is not scaled.
        with_gradients: Whether gradients flow through the predictions. The UNets are then evaluated again in the backward pass.
    """

    def __init__(
        self,
        unet: ADMUNet2DModel,
        solver: Solver,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        predictions: Predictions | None = None,
        combination: WeightedCombination | GuiderCombination | None = None,
        epsilon_scales: list[float] | None = None,
        with_gradients: bool = False,
    ):
        self.unet = unet
        self.solver = solver
        self.class_labels = class_labels
        self.low_res = low_res
        self.predictions = predictions
        self.combination = combination
        self.epsilon_scales = epsilon_scales
        self.with_gradients = with_gradients
        self.takes_sigma = unet.config.get("preconditioning") is not None
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
        if self.epsilon_scales is None:
            return output
        epsilon = self.x_0_and_epsilon(output, x_t, step)[1] / self.epsilon_scales[step]
        return self.with_epsilon(output, epsilon, x_t, step)

    def output(
        self,
        unet: ADMUNet2DModel,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the output of a UNet, `(batch, channels or 2 * channels, height, width)`, float32."""
        if self.takes_sigma:
            model_input = x_t * (1 + timestep**2).sqrt()[:, None, None, None]  # x_0 + sigma * epsilon, in float32
        else:
            if id(unet) not in self.dtypes:  # read once per run, because a model walks over all its modules to find it
                self.dtypes[id(unet)] = unet.dtype
            model_input = x_t.to(self.dtypes[id(unet)])
        inputs = (model_input, timestep, class_labels, low_res)
        output = recomputed(unet, *inputs) if self.with_gradients else unet(*inputs)
        return output.sample.float()

    def x_0_and_epsilon(self, output: torch.Tensor, x_t: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the predicted x_0 and noise of an output of the UNet, both of the shape of `x_t`."""
        schedule, index = self.solver.schedule, self.solver.visits[step]
        prediction = output[:, : x_t.shape[1]]
        x_0 = x_0_from_prediction(schedule, x_t, index, prediction, self.solver.prediction_type)
        return x_0, epsilon_from_x_0(schedule, x_t, index, x_0) if self.predicts_x_0 else prediction

    def with_epsilon(self, output: torch.Tensor, epsilon: torch.Tensor, x_t: torch.Tensor, step: int) -> torch.Tensor:
        """Returns an output of the UNet with another predicted noise. The learned variance stays."""
        prediction = epsilon
        if self.predicts_x_0:
            prediction = x_0_from_epsilon(self.solver.schedule, x_t, self.solver.visits[step], epsilon)
        return torch.cat([prediction, output[:, x_t.shape[1] :]], dim=1)

    @property
    def predicts_x_0(self) -> bool:
        """Whether the UNet predicts x_0 instead of the noise."""
        return self.solver.prediction_type == "sample"
