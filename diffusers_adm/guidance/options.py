"""Options that say when guidance acts, and how strongly."""

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
    Options that say when guidance acts, and how strongly. `interval`, `step_fractions` and `schedule` hold for classifier-free
    guidance too.

    Args:
        interval: Noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) at which guidance acts: above the first, up to and
            including the second (Kynkaanniemi et al. 2024, arXiv 2404.07724). `None` means all.
        step_fractions: Part of the run in which guidance acts, as fractions of its steps: from the first fraction up to, and
            without, the second.
        schedule: Schedule of the scale: `"constant"`, `"linear"` or `"cosine"` (both fall from 1 to 0 over the run), or a
            function of the fraction of the run.
        normalize: Whether each image's gradient is scaled to a root mean square of 1.
        max_size: Largest root mean square of each image's scaled gradient. Larger gradients are shortened to it.
        max_x_0_shift: Largest root mean square by which guidance moves the predicted x_0 of each image, which it moves by
            sigma * sqrt(1 - alpha_bar) times the scaled gradient. Larger gradients are shortened. `None` means no limit.
            `"auto"` means 0.5, about the deviation of images in [-1, 1], but no limit for DDPM and DDIM, as in the original
            code. SA-Solver is then not guided above the noise level 200, unless `interval` is given.
        entropy_scaling: Whether the scale is divided by the entropy of the classifier's prediction (Li et al. 2022, arXiv
            2206.11474).
        max_entropy_scale: Largest factor of the entropy scaling.
        every: Number of guided steps per gradient: a new gradient is computed only at every `every`-th guided step.
        skipped: Use of the last gradient at the other guided steps: it is used again (`"reuse"`), or not, and is applied once
            with the weight of all of them (`"sum"`; both in the manner of Dinh et al. 2024, arXiv 2408.11194).
        gradient_at: Place of the gradient: `"x_t"`, as in the original code, or the `"mean"` of DDPM's step, where the paper
            derives it.

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
        for name, others in (("max_entropy_scale", ()), ("max_size", (None,)), ("max_x_0_shift", (None, "auto"))):
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0) and value not in others:
                allowed = "".join(f", or {other!r}" for other in others)
                raise ValueError(f"{name}={value!r} must be a number above 0{allowed}.")

    @classmethod
    def parse(cls, given: "GuidanceOptions | dict | None") -> "GuidanceOptions":
        """
        Returns the options that a caller has given as an object, as a dict, or not at all.

        Raises:
            ValueError: If the dict has a name that is not an option.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"guidance_options must be GuidanceOptions or a dict of them: got {given!r}.")
        unknown = [name for name in given or {} if name not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"guidance_options: {unknown} are not among {tuple(cls.__dataclass_fields__)}.")
        return cls(**(given or {}))

    def factors(self, sigmas: list[float]) -> list[float]:
        """
        Returns the factor of the scale at each step; 0 where guidance does not act.

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
                    f"schedule gave {factor!r} at {fraction:g} of the run, where a finite number is needed."
                )
            factors.append(float(factor))
        return factors

    def gradient_steps(self, factors: list[float]) -> dict[int, int]:
        """
        Returns the steps that compute a gradient, and the number of steps for which each counts.

        Args:
            factors: Factor of each step; 0 where guidance does not act.
        """
        guided = [step for step, factor in enumerate(factors) if factor]
        groups = [guided[first : first + self.every] for first in range(0, len(guided), self.every)]
        return {group[0]: len(group) if self.skipped == "sum" else 1 for group in groups}
