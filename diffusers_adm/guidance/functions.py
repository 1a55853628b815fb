"""Guidance: gradients that tell a step where to go (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4), and what they shift.

What guides is a function of four arguments, `(x_t, timestep, x_0, class_labels)`: the noised images and the clean ones that
the UNet predicts, `(batch, channels, height, width)`, float32; the training timestep of each, `(batch,)`; the class of each,
`(batch,)`, or `None`. It returns a log-probability of each image, `(batch,)`, up to a constant, whose gradient guides; or that
gradient itself, of x_t's shape. The gradient is the sum of those with respect to x_t and to x_0, where x_0 is held to be
independent of x_t; a function whose attribute `through_unet` is true gets an x_0 that depends on x_t by the UNet. So this draws
brighter images:

    def brighter(x_t, timestep, x_0, class_labels):
        return 100 * x_0.mean(dim=(1, 2, 3))

    pipe(guidance_fn=brighter, guidance_scale=1.0)

All tensors are `(batch, channels, height, width)` where nothing else is said.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch


GuidanceFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Half-precision gradients of log p(y | x_t), about 1e-4 a pixel, lose bits to underflow; a power of two moves them back
# without rounding.
FLOAT16_LOSS_SCALE = 2.0**10


SCALE_SCHEDULES = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 + 0.5 * math.cos(math.pi * fraction),
}


class ClassifierGuidance:
    """
    A noise-aware classifier's log p(y | x_t).

    Args:
        classifier: Called as `classifier(x_t, timestep).logits`, `(batch, num_classes)`.
        max_entropy_scale: With it, each image's gradient is divided by the entropy of its p(y | x_t), as a share of the most
            that it can be, and multiplied by no more than this (entropy-aware scaling: Li et al. 2022, arXiv 2206.11474):
            guidance goes on where the classifier has become certain.
    """

    def __init__(self, classifier: torch.nn.Module, max_entropy_scale: float | None = None):
        self.classifier = classifier
        self.max_entropy_scale = max_entropy_scale

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the classifier's weights; `None` where it does not say."""
        return getattr(self.classifier, "dtype", None)

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """The log-probability of each image's class, `(batch,)`."""
        x_t = x_t.view_as(x_t)  # a tensor of its own, for the hook below
        logits = self.classifier(x_t.to(self.dtype or x_t.dtype), timestep).logits.float()  # (batch, num_classes)
        log_probabilities = logits.log_softmax(dim=-1)
        log_probability = log_probabilities.gather(1, class_labels[:, None])[:, 0]  # (batch,)
        if self.max_entropy_scale is not None and x_t.requires_grad:
            entropy = torch.special.entr(log_probabilities.detach().exp()).sum(dim=1)  # (batch,)
            factor = (math.log(logits.shape[1]) / entropy).clamp(max=self.max_entropy_scale)[:, None, None, None]
            # Not of the log-probability: a classifier in float16 could not hold gradients that are so large.
            x_t.register_hook(lambda gradient: factor * gradient)
        return log_probability


@dataclass(frozen=True)
class GuidanceOptions:
    """
    When guidance acts, and how strongly. `interval`, `step_fractions` and `schedule` hold for classifier-free guidance too.

    Args:
        interval: Noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) at which it acts, from above the first up to the
            second (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        step_fractions: The same as fractions of the steps of a run, the first step being 0: from the first fraction up to,
            and without, the second.
        schedule: Of the scale: `"constant"`, `"linear"` or `"cosine"` (both fall from 1 to 0 over the run), or a function
            of the fraction of the run.
        normalize: Whether each image's gradient is made of root mean square 1.
        max_size: The largest root mean square that each image's scaled gradient may have; larger ones are shortened to it.
        entropy_scaling: Whether the scale is divided by the entropy of what the classifier says.
        max_entropy_scale: The most that this may multiply by.
        every: Of so many guided steps one asks for a gradient.
        skipped: What the other steps do: use the last gradient again (`"reuse"`), or nothing, while that gradient is applied
            with the weight of all of them (`"sum"`; both in the manner of Dinh et al. 2024, arXiv 2408.11194).
        gradient_at: Where the gradient is taken: at `"x_t"`, as the published code does, or at the `"mean"` of DDPM's step,
            as the paper derives it.

    Raises:
        ValueError: If one is not of these.
    """

    interval: tuple[float, float] | None = None
    step_fractions: tuple[float, float] = (0.0, 1.0)
    schedule: str | Callable[[float], float] = "constant"
    normalize: bool = False
    max_size: float | None = None
    entropy_scaling: bool = False
    max_entropy_scale: float = 1000.0
    every: int = 1
    skipped: str = "reuse"
    gradient_at: str = "x_t"

    def __post_init__(self):
        for name, window, last in (
            ("interval", (0, 1) if self.interval is None else self.interval, math.inf),
            ("step_fractions", self.step_fractions, 1),
        ):
            numbers = isinstance(window, (tuple, list)) and all(isinstance(end, Real) for end in window)
            if not (numbers and len(window) == 2 and 0 <= window[0] < window[1] <= last):
                raise ValueError(f"{name}={window!r} must be two numbers in [0, {last}], the smaller first.")
        if not (callable(self.schedule) or self.schedule in tuple(SCALE_SCHEDULES)):
            raise ValueError(f"schedule={self.schedule!r} is not one of {tuple(SCALE_SCHEDULES)}, or a function.")
        if not (isinstance(self.every, Integral) and self.every >= 1):
            raise ValueError(f"every={self.every!r} must be an integer, at least 1.")
        for name, known in (("skipped", ("reuse", "sum")), ("gradient_at", ("x_t", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {known}.")
        for name in ("normalize", "entropy_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not True or False.")
        for name in ("max_entropy_scale", "max_size"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0) and not (name == "max_size" and value is None):
                raise ValueError(f"{name}={value!r} must be a number above 0.")

    @classmethod
    def parse(cls, given: "GuidanceOptions | dict | None") -> "GuidanceOptions":
        """
        Options that are given as themselves, as a dict, or not at all.

        Raises:
            ValueError: If the dict has a name that is none of theirs.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"guidance_options must be GuidanceOptions or a dict of them: got {given!r}.")
        unknown = sorted(set(given or {}) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"guidance_options: {unknown} are not among {tuple(cls.__dataclass_fields__)}.")
        return cls(**(given or {}))

    def factors(self, sigmas: list[float]) -> list[float]:
        """
        What the scale is multiplied by at each step; 0 where guidance does not act.

        Args:
            sigmas: Noise level of each step, in the order in which they are taken.

        Raises:
            ValueError: If the schedule gives something else than finite numbers.
        """
        schedule = self.schedule if callable(self.schedule) else SCALE_SCHEDULES[self.schedule]
        factors = []
        for step, sigma in enumerate(sigmas):
            fraction = step / len(sigmas)
            acts = self.interval is None or self.interval[0] < sigma <= self.interval[1]
            acts = acts and self.step_fractions[0] <= fraction < self.step_fractions[1]
            factor = schedule(fraction) if acts else 0.0
            if not (isinstance(factor, Real) and math.isfinite(factor)):
                raise ValueError(
                    f"schedule gave {factor!r} at {fraction:g} of the run, where a finite number is needed."
                )
            factors.append(float(factor))
        return factors

    def gradient_steps(self, factors: list[float]) -> dict[int, int]:
        """
        The steps at which a gradient is asked for, and for how many steps each counts.

        Args:
            factors: Of each step; 0 where guidance does not act.
        """
        guided = [step for step, factor in enumerate(factors) if factor]
        groups = [guided[first : first + self.every] for first in range(0, len(guided), self.every)]
        return {group[0]: len(group) if self.skipped == "sum" else 1 for group in groups}


def normalized(gradient: torch.Tensor) -> torch.Tensor:
    """Each image's gradient with a root mean square of 1; one that is zero stays so."""
    size = root_mean_square(gradient)
    return torch.where(size > 0, gradient / size, gradient)


def shortened(gradient: torch.Tensor, max_size: float) -> torch.Tensor:
    """Each image's gradient with a root mean square of no more than a number."""
    size = root_mean_square(gradient)
    return torch.where(size > max_size, gradient * (max_size / size), gradient)


def root_mean_square(gradient: torch.Tensor) -> torch.Tensor:
    """Of each image, `(batch, 1, 1, 1)`."""
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    largest = largest.where(largest > 0, 1.0)  # squares of very large or small numbers would be lost
    return largest * (gradient / largest).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


@contextlib.contextmanager
def differentiable():
    """
    What is computed here has gradients with respect to inputs, and weights have none; also within `torch.no_grad` and
    `torch.inference_mode`, and with offloaded or layerwise-cast weights.
    """
    # Offloading and layerwise casting put other data into a parameter after its module's forward, which the backward
    # pass would then read; a detached tensor keeps what it saw.
    keep_weights = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), keep_weights:
        yield


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy to take gradients with respect to; autograd does not save what was made in inference mode."""
    return tensor.detach().clone().requires_grad_()


def guidance_gradient(
    guidance_fn: GuidanceFunction,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    x_0: torch.Tensor,
    class_labels: torch.Tensor | None,
    through_half: bool = False,
) -> torch.Tensor:
    """
    The gradient that a function guides by. Weights and their `requires_grad` stay as they are.

    Args:
        guidance_fn: As above.
        x_t: Noised images; a leaf that requires a gradient where `x_0` depends on it.
        timestep: Training timestep of each image, `(batch,)`.
        x_0: Predicted clean images.
        class_labels: The class that guides each image, `(batch,)`, or `None`.
        through_half: Whether `x_0` depends on x_t by a network in float16. At the cost of a second backward pass of the
            function, the gradient is then scaled so that float16 neither overflows nor underflows on its way back.

    Returns:
        Of x_t's shape and dtype.

    Raises:
        ValueError: If the function returns something else than a log-probability of each image or a gradient.
    """
    device = x_t.device.type
    half = getattr(guidance_fn, "dtype", None) == torch.float16
    half = half or (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16)
    with differentiable():
        depends = x_0.grad_fn is not None
        if not depends:
            x_t, x_0 = leaf(x_t), leaf(x_0)
        # Autograd does not save what was made in inference mode; clones are made outside it.
        value = guidance_fn(x_t, timestep.clone(), x_0, None if class_labels is None else class_labels.clone())
        if not isinstance(value, torch.Tensor) or value.shape not in (x_t.shape, x_t.shape[:1]):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"guidance_fn returned {got}, where a log-probability of each image, {tuple(x_t.shape[:1])}, or a gradient,"
                f" {tuple(x_t.shape)}, is needed."
            )
        if value.shape == x_t.shape:
            return value.detach().to(x_t.dtype)
        inputs = [x_t] if depends else [x_t, x_0]
        gradients = [None]
        value = value.float()  # (batch,)
        loss_scale = torch.full_like(value, FLOAT16_LOSS_SCALE if half else 1.0)  # powers of two do not round
        if through_half and value.requires_grad:
            (at_x_0,) = torch.autograd.grad((loss_scale * value).sum(), x_0, retain_graph=True, allow_unused=True)
            if at_x_0 is not None:
                _, exponent = (at_x_0.abs().amax(dim=(1, 2, 3)) / loss_scale).frexp()
                largest = FLOAT16_LOSS_SCALE if half else math.inf  # more, the function could not hold
                loss_scale = torch.ldexp(torch.ones_like(value), -exponent).clamp(max=largest)
        if value.requires_grad:
            # The sum, not the mean: an image's gradient must not depend on the batch it is in.
            gradients = torch.autograd.grad((loss_scale * value).sum(), inputs, allow_unused=True)
        gradients = [one for one in gradients if one is not None]
        if not gradients:
            raise ValueError("guidance_fn returned a log-probability that does not depend on x_t or x_0.")
        gradient = sum(gradients)
    return (gradient / loss_scale[:, None, None, None]).to(x_t.dtype)


def classifier_gradient(
    classifier: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """
    The gradient of log p(y | x_t) with respect to x_t, taken at x_t as the published code does.

    Args:
        classifier: Called as `classifier(x_t, timestep).logits`, `(batch, num_classes)`.
        x_t: Noised images.
        timestep: Training timestep of each image, `(batch,)`.
        class_labels: The class that guides each image, `(batch,)`.

    Returns:
        Of x_t's shape and dtype.
    """
    x_t = x_t.detach()
    return guidance_gradient(ClassifierGuidance(classifier), x_t, timestep, x_t, class_labels)


def combine_predictions(
    prediction: torch.Tensor, weaker: torch.Tensor, weight: torch.Tensor | float, channels: int
) -> torch.Tensor:
    """
    (1 + w) * prediction - w * weaker, of two outputs of networks: classifier-free guidance where the weaker is that of no
    class (Ho & Salimans 2022, arXiv 2207.12598, eq. 6), autoguidance where it is that of a worse network (Karras et al.
    2024, arXiv 2406.02507).

    Args:
        prediction: `(batch, channels or 2 * channels, height, width)`; a learned variance is taken from it.
        weaker: The same of the other.
        weight: w, one number or `(batch, 1, 1, 1)`.
        channels: Of the images.
    """
    combined = (1 + weight) * prediction[:, :channels] - weight * weaker[:, :channels]
    return torch.cat([combined, prediction[:, channels:]], dim=1)


def shift_mean(mean: torch.Tensor, log_variance: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    The guided mean of p(x_{t-1} | x_t, y): mu + Sigma * gradient [Algorithm 1].

    Args:
        mean: Of the unguided step, or a draw from it: guidance moves both alike.
        log_variance: Of the step.
        gradient: Of log p(y | x_t), times the guidance scale.
    """
    variance = torch.as_tensor(log_variance).exp()
    return mean + variance * gradient


def shift_epsilon(epsilon: torch.Tensor, noise_scale: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    The guided noise: epsilon - sqrt(1 - alpha_bar) * gradient [Algorithm 2, whose text leaves out the scale].

    Args:
        epsilon: Predicted noise.
        noise_scale: sqrt(1 - alpha_bar).
        gradient: Of log p(y | x_t), times the guidance scale.
    """
    return epsilon - noise_scale * gradient
