"""Options of guidance: the steps at which it acts, and its strength."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real


SCALE_SCHEDULES = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 + 0.5 * math.cos(math.pi * fraction),
}


@dataclass(frozen=True)
class GuidanceOptions:
    """
    Options of guidance: the steps at which it acts, and its strength. `interval`, `step_fractions` and `schedule` also apply to
    classifier-free guidance and autoguidance.

    Args:
        interval: Interval `(low, high)` of noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar). Guidance acts at steps with
            low < sigma <= high (Kynkaanniemi et al. 2024, arXiv 2404.07724). `None` means all noise levels.
        step_fractions: Part `(first, last)` of the run in which guidance acts, as fractions of its steps. The step at `first` is
            guided, and the step at `last` is not.
        schedule: Schedule of the guidance scale: `"constant"`, `"linear"`, `"cosine"`, or a function from the fraction of the run
            to a factor. The linear and the cosine schedule fall from 1 to 0 over the run.
        normalize: Whether each image's gradient is scaled to a root mean square of 1.
        max_size: Largest root mean square of each image's scaled gradient. Larger gradients are shortened to it.
        max_x_0_shift: Largest root mean square of the shift of each image's predicted x_0. Guidance shifts x_0 by
            sigma * sqrt(1 - alpha_bar) times the scaled gradient. Gradients that would shift it further are shortened. `None` means
            no limit. `"auto"` means no limit for DDPM and DDIM, as in the original code. For other schedulers it means 0.5, about
            the standard deviation of images in [-1, 1]. With `"auto"`, SA-Solver is guided only up to noise level 200, unless
            `interval` is given.
        entropy_scaling: Whether the gradient is divided by the entropy of the classifier's prediction, as a fraction of the largest
            possible entropy (Li et al. 2022, arXiv 2206.11474).
        max_entropy_scale: Largest factor of the entropy scaling.
        every: Number of guided steps per gradient. A new gradient is computed only at every `every`-th guided step.
        skipped: Treatment of the guided steps without a new gradient (Dinh et al. 2024, arXiv 2408.11194). `"reuse"` applies the
            last gradient again at each of them. `"sum"` leaves them unguided. It multiplies each new gradient by the number of steps
            up to the next new gradient.
        gradient_at: Point at which the gradient is taken: `"x_t"`, as in the original code, or `"mean"`, the mean of DDPM's step,
            as in the derivation of the paper.

    Raises:
        ValueError: If an option is out of its range.
    """

    interval: tuple[float, float] | None = None
    step_fractions: tuple[float, float] = (0.0, 1.0)
    schedule: str | Callable[[float], float] = "constant"
    normalize: bool = False
    max_size: float | None = None
    max_x_0_shift: float | str | None = "auto"
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
                raise ValueError(
                    f"`{name}` must be two numbers in [0, {last}], the smaller first, but got {window!r}."
                )
        if not (callable(self.schedule) or self.schedule in tuple(SCALE_SCHEDULES)):
            raise ValueError(
                f"`schedule` must be one of {tuple(SCALE_SCHEDULES)}, or a function, but got {self.schedule!r}."
            )
        if not (isinstance(self.every, Integral) and self.every >= 1):
            raise ValueError(f"`every` must be an integer of at least 1, but got {self.every!r}.")
        for name, known in (("skipped", ("reuse", "sum")), ("gradient_at", ("x_t", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, but got {getattr(self, name)!r}.")
        for name in ("normalize", "entropy_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but got {getattr(self, name)!r}.")
        for name, others in (("max_entropy_scale", ()), ("max_size", (None,)), ("max_x_0_shift", (None, "auto"))):
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0) and value not in others:
                allowed = "".join(f", or {other!r}" for other in others)
                raise ValueError(f"`{name}` must be a number above 0{allowed}, but got {value!r}.")

    @classmethod
    def parse(cls, given: "GuidanceOptions | dict | None") -> "GuidanceOptions":
        """
        Returns options that were given as an object, as a dict, or as `None` for the defaults.

        Raises:
            ValueError: If `given` has another type, or the dict has a name that is not an option.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, dict):
            raise ValueError(
                f"`guidance_options` must be a GuidanceOptions or a dict of its options, but got {given!r}."
            )
        unknown = [name for name in given or {} if name not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(
                f"`guidance_options` must have names among {tuple(cls.__dataclass_fields__)}, but got {unknown}."
            )
        return cls(**(given or {}))

    def factors(self, sigmas: list[float]) -> list[float]:
        """
        Returns the factor of the guidance scale at each step. It is 0 at steps without guidance.

        Args:
            sigmas: Noise level of each step, in the order of the run.

        Raises:
            ValueError: If the schedule returns a value that is not a finite number.
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
                    f"`schedule` must return a finite number, but at fraction {fraction:g} of the run it returned {factor!r}."
                )
            factors.append(float(factor))
        return factors

    def gradient_steps(self, factors: list[float]) -> dict[int, int]:
        """
        Returns the steps that compute a gradient. The value of each step is the number by which its gradient is multiplied.

        Args:
            factors: Factor of the guidance scale at each step. It is 0 at steps without guidance.
        """
        guided = [step for step, factor in enumerate(factors) if factor]
        groups = [guided[first : first + self.every] for first in range(0, len(guided), self.every)]
        return {group[0]: len(group) if self.skipped == "sum" else 1 for group in groups}
