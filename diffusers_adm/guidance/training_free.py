"""Guidance functions of the predicted x_0 in training-free guidance (Ye et al. 2024, arXiv 2409.15761)."""

import functools
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
        rows: Images that are guided. The others draw no noise from generators of their own, so that they are the same in any batch.
            `None` means all images.
    """

    def __init__(
        self,
        guidance_fn: GuidanceFunction,
        deviation: float,
        samples: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        rows: list[int] | None = None,
    ):
        super().__init__(guidance_fn)
        self.rows = rows
        self.deviation = deviation
        self.samples = samples
        self.generator = generator

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the logarithm of the mean probability of each image, `(batch,)`."""
        values = []
        for _ in range(self.samples):  # one batch per sample, because a function may keep a tensor per image
            value = self.guidance_fn(x_t, timestep, x_0 + self.deviation * self._noise(x_0), class_labels)
            values.append(log_probability(value, x_t, self.guidance_fn, "smoothing").float())
        return torch.stack(values).logsumexp(dim=0) - math.log(self.samples)

    def _noise(self, x_0: torch.Tensor) -> torch.Tensor:
        draw = functools.partial(randn_tensor, device=x_0.device, dtype=x_0.dtype)
        if not isinstance(self.generator, list):
            return draw(x_0.shape, generator=self.generator)
        rows = list(range(len(x_0))) if self.rows is None else self.rows
        noise, own = torch.zeros_like(x_0), [self.generator[row] for row in rows]
        noise[rows] = draw((len(own), *x_0.shape[1:]), generator=own)
        return noise


class GuidanceAtX0(WrappedGuidance):
    """
    Guidance function of x_0 alone, at a fixed x_t.

    Args:
        guidance_fn: Guidance function, see the docstring of `diffusers_adm.guidance`.
        with_gradients: Whether the gradient with respect to x_0 is itself differentiated with respect to x_t.
    """

    of_x_0_alone = True

    def __init__(self, guidance_fn: GuidanceFunction, with_gradients: bool = False):
        super().__init__(guidance_fn)
        self.with_gradients = with_gradients

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the log-probability of each image, `(batch,)`."""
        x_t = x_t if self.with_gradients else x_t.detach()
        value = self.guidance_fn(x_t, timestep, x_0, class_labels)
        value = log_probability(value, x_t, self.guidance_fn, "x_0_weight")
        if not value.requires_grad:
            raise ValueError("`x_0_weight` requires a `guidance_fn` that computes the log-probability from x_0.")
        return value


def log_probability(
    value: torch.Tensor, x_t: torch.Tensor, guidance_fn: GuidanceFunction, option: str
) -> torch.Tensor:
    """
    Returns what a guidance function has returned.

    Args:
        value: Value of the function.
        x_t: Noised images, `(batch, channels, height, width)`.
        guidance_fn: The function.
        option: Option that requires a log-probability.

    Raises:
        ValueError: If the value has another shape than that of a log-probability per image, or is the sum of a gradient.
    """
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor and value.shape == x_t.shape[:1] and not getattr(guidance_fn, "has_gradient", False):
        return value
    got = tuple(value.shape) if is_tensor else type(value).__name__
    if is_tensor and value.shape == x_t.shape[:1]:
        got = "the sum of a gradient and others"
    raise ValueError(
        f"`guidance_fn` must return one log-probability per image with `{option}`, {tuple(x_t.shape[:1])}, but it returned {got}."
    )
