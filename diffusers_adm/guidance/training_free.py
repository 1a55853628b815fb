"""Guidance functions of the predicted x_0 in training-free guidance (Ye et al. 2024, arXiv 2409.15761)."""

import math

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.guidance.gradient import GuidanceFunction


class WrappedGuidance:
    """
    Guidance function that evaluates another one.

    Args:
        guidance_fn: Guidance function, see the docstring of `diffusers_adm.guidance`.
    """

    def __init__(self, guidance_fn: GuidanceFunction):
        self.guidance_fn = guidance_fn
        self.weights_may_move = getattr(guidance_fn, "weights_may_move", True)
        self.frozen_weights = getattr(guidance_fn, "frozen_weights", [])

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of the weights. `None` if the function has none."""
        return getattr(self.guidance_fn, "dtype", None)


class SmoothedGuidance(WrappedGuidance):
    """
    log E exp(f(x_0 + deviation * n)) of a guidance function f, estimated by some samples of the noise n.

    Args:
        guidance_fn: Guidance function f.
        deviation: Standard deviation of the noise.
        samples: Number of samples.
        generator: Generator of the noise, one for all images or one per image.
    """

    def __init__(
        self,
        guidance_fn: GuidanceFunction,
        deviation: float,
        samples: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        super().__init__(guidance_fn)
        self.deviation = deviation
        self.samples = samples
        self.generator = generator

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the logarithm of the mean probability of each image, `(batch,)`."""
        values = []
        for _ in range(self.samples):  # one batch per sample, because a function may keep a tensor per image
            noise = randn_tensor(x_0.shape, generator=self.generator, device=x_0.device, dtype=x_0.dtype)
            value = self.guidance_fn(x_t, timestep, x_0 + self.deviation * noise, class_labels)
            values.append(log_probability(value, x_t, "smoothing").float())
        return torch.stack(values).logsumexp(dim=0) - math.log(self.samples)


class GuidanceAtX0(WrappedGuidance):
    """Guidance function of x_0 alone, at a fixed x_t. The argument is that of [`WrappedGuidance`]."""

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the log-probability of each image, `(batch,)`."""
        value = log_probability(self.guidance_fn(x_t.detach(), timestep, x_0, class_labels), x_t, "x_0_weight")
        if not value.requires_grad:
            raise ValueError("`x_0_weight` requires a `guidance_fn` that computes the log-probability from x_0.")
        return value


def log_probability(value: torch.Tensor, x_t: torch.Tensor, option: str) -> torch.Tensor:
    """
    Returns what a guidance function has returned.

    Args:
        value: Value of the function.
        x_t: Noised images, `(batch, channels, height, width)`.
        option: Option that requires a log-probability.

    Raises:
        ValueError: If the value has another shape than that of a log-probability per image.
    """
    if not isinstance(value, torch.Tensor) or value.shape != x_t.shape[:1]:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(
            f"`guidance_fn` must return one log-probability per image with `{option}`, {tuple(x_t.shape[:1])}, but it returned {got}."
        )
    return value
