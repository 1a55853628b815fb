"""Sums of guidance functions, and guidance by a discriminator."""

import math

import torch
from torch import nn

from diffusers_adm.checks import is_number
from diffusers_adm.guidance.functions import ClassifierGuidance
from diffusers_adm.guidance.gradient import GuidanceFunction, check_value, moves_weights


class ValueOfGradient(torch.autograd.Function):
    """Value per image, of no meaning, that has a given gradient with respect to x_t. The gradient may have a graph itself."""

    @staticmethod
    def forward(ctx, x_t: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros_like(x_t[:, 0, 0, 0])

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output[:, None, None, None] * gradient, None


class WeightedSum:
    """
    Weighted sum of guidance functions. Functions that guide through the UNet still do so in the sum. The other functions are given x_0
    as if it did not depend on x_t.

    Args:
        functions: Guidance functions, see the docstring of `diffusers_adm.guidance`.
        weights: Weight of each function. `None` means 1 for each.

    Attributes:
        dtype: float16 if at least one function is evaluated in float16, otherwise the data type of the first function.
        through_unet: Whether at least one function guides through the UNet.
        weights_may_move: Whether the weights of a network may be replaced between the forward and the backward pass.
        frozen_weights: Weights of the functions' networks. They are frozen while the gradient is computed.
        has_gradient: Whether a function returned a gradient in the last call. The sum is then no log-probability, but has the right
            gradient.

    Raises:
        ValueError: If no function is given, one of them is not callable, the numbers of weights and functions differ, or a weight is
            not finite.
    """

    def __init__(self, *functions: GuidanceFunction, weights: list[float] | None = None):
        if not functions or not all(map(callable, functions)):
            raise ValueError(f"`functions` must be at least one guidance function, but got {functions!r}.")
        weights = [1.0] * len(functions) if weights is None else weights
        if (
            not isinstance(weights, (list, tuple))
            or len(weights) != len(functions)
            or not all(is_number(weight) and math.isfinite(weight) for weight in weights)
        ):
            raise ValueError(
                f"`weights` must be one finite number per function ({len(functions)}), but got {weights!r}."
            )
        self.has_gradient = False
        self.functions = functions
        self.weights = list(weights)
        self.through_unet = any(getattr(function, "through_unet", False) for function in functions)
        self.weights_may_move = any(getattr(function, "weights_may_move", True) for function in functions)
        self.frozen_weights = [weight for function in functions for weight in getattr(function, "frozen_weights", [])]

    @property
    def dtype(self) -> torch.dtype | None:
        dtypes = [getattr(function, "dtype", None) for function in self.functions]
        return torch.float16 if torch.float16 in dtypes else dtypes[0]

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the weighted sum of the log-probabilities, `(batch,)`."""
        # The gradient with respect to direct_x_0 reaches x_t unchanged, as for functions that do not guide through the UNet.
        # If x_t needs no gradient, or is no leaf because the gradient itself is differentiated, x_0 itself is a variable.
        through = self.through_unet and x_t.requires_grad and x_t.is_leaf
        direct_x_0 = x_0.detach() + (x_t - x_t.detach()) if through else x_0
        total, self.has_gradient = torch.zeros(len(x_t), device=x_t.device), False
        for function, weight in zip(self.functions, self.weights):
            own_x_0 = x_0 if getattr(function, "through_unet", False) else direct_x_0
            value = function(x_t, timestep, own_x_0, class_labels)
            check_value(value, x_t)
            self.has_gradient |= value.shape == x_t.shape or getattr(function, "has_gradient", False)
            if value.shape == x_t.shape:
                value = ValueOfGradient.apply(x_t, value)
            total = total + weight * value.float()
        return total


def summands(guidance_fn: GuidanceFunction | None) -> list[GuidanceFunction | None]:
    """Returns the functions that a guidance function consists of: those of a sum, also of sums within it, or the function alone."""
    if not isinstance(guidance_fn, WeightedSum):
        return [guidance_fn]
    return [part for function in guidance_fn.functions for part in summands(function)]


def networks_of_guidance(guidance_fn: GuidanceFunction | None) -> list[nn.Module]:
    """Returns the networks that the summands of a guidance function evaluate. Functions of the caller name theirs as `network`."""
    networks = (getattr(part, "network", None) for part in summands(guidance_fn))
    return [network for network in networks if isinstance(network, nn.Module)]


def classes_of_guidance(guidance_fn: GuidanceFunction | None) -> list[int]:
    """Returns the number of classes of each summand of a guidance function that has classes."""
    counts = (getattr(part, "num_classes", None) for part in summands(guidance_fn))
    return [count for count in counts if count is not None]


class DiscriminatorGuidance(ClassifierGuidance):
    """
    Guidance by a discriminator, a noise-aware classifier of real and generated images: log d(x_t) - log(1 - d(x_t)), where d is the
    probability that an image is real. It corrects the errors of the model that has generated the images (Kim et al. 2023, arXiv
    2211.17091). The correction as it is derived there has a guidance scale of 1.

    Args:
        discriminator: Module with two classes that is called as `discriminator(x_t, timestep).logits`, `(batch, 2)`.
        real_class: Number of the class of real images.

    Raises:
        ValueError: If the discriminator has another number of classes, or `real_class` is neither 0 nor 1.
    """

    num_classes = None  # the classes of the images do not matter

    def __init__(self, discriminator: nn.Module, real_class: int = 1):
        num_classes = getattr(getattr(discriminator, "config", None), "num_classes", 2)
        if num_classes != 2:
            raise ValueError(f"`discriminator` must have 2 classes, real and generated, but got {num_classes}.")
        if real_class not in (0, 1) or isinstance(real_class, bool):
            raise ValueError(f"`real_class` must be 0 or 1, but got {real_class!r}.")
        super().__init__(discriminator)
        self.real_class = real_class
        self.weights_may_move = moves_weights(discriminator)

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns log d(x_t) - log(1 - d(x_t)), `(batch,)`."""
        log_probabilities = self.log_probabilities(x_t, timestep)  # (batch, 2)
        return log_probabilities[:, self.real_class] - log_probabilities[:, 1 - self.real_class]
