"""Options of guidance: the steps at which it acts, its strength, and the methods of training-free guidance."""

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real

from diffusers_adm.checks import is_integer, is_number


SCALE_SCHEDULES = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1.0 - fraction,
    "cosine": lambda fraction: 0.5 + 0.5 * math.cos(math.pi * fraction),
}
# Schedules of training-free guidance (Ye et al. 2024, arXiv 2409.15761), which are scaled to a mean of 1 over the steps of the run. They are
# functions of alpha_t = alpha_bar_t / alpha_bar_{t-1}, where t-1 is the next lower noise level of the run.
ALPHA_SCHEDULES = {"increase": lambda alpha: alpha, "decrease": lambda alpha: 1 - alpha}
SCHEDULES = (*SCALE_SCHEDULES, *ALPHA_SCHEDULES)
# Methods for functions of clean images, as special cases of training-free guidance (Ye et al. 2024, arXiv 2409.15761).
METHODS = {
    # Chung et al. 2022, arXiv 2209.14687
    "dps": {"through_unet": True},
    # Song et al. 2023, Loss-guided diffusion models for plug-and-play controllable generation
    "lgd": {"through_unet": True, "smoothing": 1.0},
    # Yu et al. 2023, arXiv 2303.09833
    "freedom": {"through_unet": True, "recurrence": 2},
    # He et al. 2023, arXiv 2311.16424
    "mpgd": {"x_t_weight": 0.0, "x_0_weight": 1.0},
    # Bansal et al. 2023, arXiv 2302.07121
    "ugd": {"through_unet": True, "x_0_weight": 1.0, "x_0_iterations": 4, "recurrence": 2},
    # All of them in one (section 3)
    "tfg": {"through_unet": True, "x_0_weight": 1.0, "x_0_iterations": 4, "smoothing": 0.1, "schedule": "increase"},
    # Yang et al. 2024, arXiv 2402.03201
    "dsg": {"through_unet": True, "spherical": 0.1},
}


@dataclass(frozen=True)
class GuidanceOptions:
    """
    Options of guidance: the steps at which it acts, and its strength. `interval`, `step_fractions`, `schedule` and `recurrence` also
    apply to classifier-free guidance and autoguidance.

    The last eight options are those of training-free guidance (Ye et al. 2024, arXiv 2409.15761), for a `guidance_fn` of the predicted
    x_0. Order of a step: the gradient with respect to x_t, the iterations that move x_0, the step from the moved x_0, the noise that is
    added again.

    Args:
        interval: Interval `(low, high)` of noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar). Guidance acts at steps with
            low < sigma <= high (Kynkaanniemi et al. 2024, arXiv 2404.07724). `None` means all noise levels.
        step_fractions: Part `(first, last)` of the run in which guidance acts, as fractions of its steps. The step at `first` is
            guided, and the step at `last` is not.
        schedule: Schedule of the guidance scale: `"constant"`, `"linear"`, `"cosine"`, `"increase"`, `"decrease"`, or a function from
            the fraction of the run to a factor. The linear and the cosine schedule fall from 1 to 0 over the run. `"increase"` is
            proportional to alpha_t, the ratio of alpha_bar before and after a step, and `"decrease"` to 1 - alpha_t. Both have a mean of
            1 over the steps.
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
        through_unet: Whether the gradient with respect to x_t goes through the UNet. `None` means the attribute `through_unet` of the
            guidance function.
        x_t_weight: Weight of the gradient that shifts the step. It multiplies the guidance scale. 0 turns this shift off.
        x_0_weight: Weight of the gradient with respect to x_0, by which the predicted x_0 is moved before the step. It multiplies the
            guidance scale. The moved x_0 replaces the prediction of the UNet. `max_x_0_shift` limits the whole move.
        x_0_iterations: Number of gradient steps that move x_0.
        smoothing: Standard deviation of the noise that is added to x_0 before the guidance function is evaluated, divided by
            sqrt(1 - alpha_bar). The function is replaced by log E exp(function) over this noise. 0 adds no noise.
        smoothing_samples: Number of samples of the noise that estimate this expectation.
        recurrence: Number of times that each step is taken at which guidance acts. In between, noise is added again up to the noise
            level of the step. It requires DDPM or DDIM.
        spherical: Rate in (0, 1] of spherical guidance (Yang et al. 2024, arXiv 2402.03201). The noise of the step is mixed with the
            direction of the gradient at this rate, and scaled to the length that noise has on average. The gradient has no other effect
            on the step. It requires DDPM, or DDIM with `eta` above 0.

    Raises:
        ValueError: If an option is out of its range, or contradicts another option.
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
    through_unet: bool | None = None
    x_t_weight: float = 1.0
    x_0_weight: float = 0.0
    x_0_iterations: int = 1
    smoothing: float = 0.0
    smoothing_samples: int = 4
    recurrence: int = 1
    spherical: float | None = None

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
        if not (callable(self.schedule) or self.schedule in SCHEDULES):
            raise ValueError(f"`schedule` must be one of {SCHEDULES}, or a function, but got {self.schedule!r}.")
        for name in ("every", "x_0_iterations", "smoothing_samples", "recurrence"):
            count = getattr(self, name)
            if not (is_integer(count) and count >= 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, but got {count!r}.")
        for name, known in (("skipped", ("reuse", "sum")), ("gradient_at", ("x_t", "mean"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, but got {getattr(self, name)!r}.")
        for name, others in (("normalize", ()), ("entropy_scaling", ()), ("through_unet", (None,))):
            if not isinstance(getattr(self, name), bool) and getattr(self, name) not in others:
                allowed = "".join(f", or {other!r}" for other in others)
                raise ValueError(f"`{name}` must be True or False{allowed}, but got {getattr(self, name)!r}.")
        for name, others in (("max_entropy_scale", ()), ("max_size", (None,)), ("max_x_0_shift", (None, "auto"))):
            value = getattr(self, name)
            if not (isinstance(value, Real) and value > 0) and value not in others:
                allowed = "".join(f", or {other!r}" for other in others)
                raise ValueError(f"`{name}` must be a number above 0{allowed}, but got {value!r}.")
        for name in ("x_t_weight", "x_0_weight", "smoothing"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"`{name}` must be a finite number of at least 0, but got {value!r}.")
        if self.spherical is not None and not (is_number(self.spherical) and 0 < self.spherical <= 1):
            raise ValueError(f"`spherical` must be a number in (0, 1], or None, but got {self.spherical!r}.")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        """Raises a `ValueError` if an option has no effect, or no meaning, together with another option."""
        moves_x_0, shifts, mixes = self.x_0_weight != 0, self.x_t_weight != 0, self.spherical is not None
        contradictions = (
            ("x_t_weight=0", "x_0_weight=0", not (shifts or moves_x_0), "because nothing would guide"),
            ("x_t_weight=0", "through_unet=True", not shifts and self.through_unet, "whose gradient it turns off"),
            ("x_t_weight=0", "`spherical`", not shifts and mixes, "whose gradient it turns off"),
            ("`x_0_iterations`", "x_0_weight=0", self.x_0_iterations > 1 and not moves_x_0, "which turns them off"),
            ("`normalize`", "`spherical`", self.normalize and mixes, "which uses only directions"),
            ("`max_size`", "`spherical`", self.max_size is not None and mixes, "which uses only directions"),
            ("`every`", "`x_0_weight`", self.every > 1 and moves_x_0, "which moves x_0 at each step"),
            ("`every`", "`recurrence`", self.every > 1 and self.recurrence > 1, "which outdates gradients"),
            ("gradient_at='mean'", "`x_0_weight`", self.gradient_at == "mean" and moves_x_0, "which moves x_0 itself"),
        )
        for option, other, contradicts, reason in contradictions:
            if contradicts:
                raise ValueError(f"{option} does not go together with {other} in `guidance_options`, {reason}.")

    @classmethod
    def parse(cls, given: "GuidanceOptions | dict | str | None") -> "GuidanceOptions":
        """
        Returns options that were given as an object, as the name of a method in `METHODS`, as a dict, or as `None` for the defaults. The
        entry `"method"` of a dict is such a name. The other entries override the options of the method.

        Raises:
            ValueError: If `given` has another type, the method is unknown, or the dict has a name that is not an option.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, (dict, str)):
            raise ValueError(
                f"`guidance_options` must be a GuidanceOptions, a dict of its options or the name of a method, but got {given!r}."
            )
        options = {"method": given} if isinstance(given, str) else dict(given or {})
        if "method" in options:
            method = options.pop("method")
            if method not in tuple(METHODS):
                raise ValueError(
                    f"The method of `guidance_options` must be one of {tuple(METHODS)}, but got {method!r}."
                )
            options = METHODS[method] | options
        unknown = [name for name in options if name not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(
                f"`guidance_options` must have names among {('method', *cls.__dataclass_fields__)}, but got {unknown}."
            )
        return cls(**options)

    def goes_through_unet(self, guidance_fn: Callable | None) -> bool:
        """Returns whether the gradient of a guidance function goes through the UNet."""
        return getattr(guidance_fn, "through_unet", False) if self.through_unet is None else self.through_unet

    @property
    def needs_function_of_x_0(self) -> bool:
        """Whether the options require a guidance function that is applied to the predicted x_0."""
        return bool(self.through_unet or self.x_0_weight or self.smoothing)

    @property
    def has_known_density(self) -> bool:
        """Whether a step of DDPM still has the density of Algorithm 1, by which particles are weighted."""
        return not (self.x_0_weight or self.smoothing or self.recurrence > 1 or self.spherical)

    def factors(self, sigmas: list[float]) -> list[float]:
        """
        Returns the factor of the guidance scale at each step. It is 0 at steps without guidance.

        Args:
            sigmas: Noise level of each step, in the order of the run.

        Raises:
            ValueError: If the schedule returns a value that is not a finite number.
        """
        schedule, factors = self._schedule(sigmas), []
        for step, sigma in enumerate(sigmas):
            fraction = step / len(sigmas)
            acts = self.interval is None or self.interval[0] < sigma <= self.interval[1]
            acts = acts and self.step_fractions[0] <= fraction < self.step_fractions[1]
            factor = schedule(step) if acts else 0.0
            if not (isinstance(factor, Real) and math.isfinite(factor)):
                raise ValueError(
                    f"`schedule` must return a finite number, but at fraction {fraction:g} of the run it returned {factor!r}."
                )
            factors.append(float(factor))
        return factors

    def _schedule(self, sigmas: list[float]) -> Callable[[int], float]:
        """Returns the schedule of the guidance scale as a function from the number of a step to a factor."""
        if self.schedule in tuple(ALPHA_SCHEDULES):
            levels = sorted({0.0, *sigmas})
            lower = dict(zip(levels[1:], levels))
            alphas = [(1 + lower.get(sigma, 0.0) ** 2) / (1 + sigma**2) for sigma in sigmas]
            values = [ALPHA_SCHEDULES[self.schedule](alpha) for alpha in alphas]
            mean = sum(values) / len(values)
            return lambda step: values[step] / mean
        schedule = self.schedule if callable(self.schedule) else SCALE_SCHEDULES[self.schedule]
        return lambda step: schedule(step / len(sigmas))

    def gradient_steps(self, factors: list[float], jumps: Sequence[int] = ()) -> dict[int, int]:
        """
        Returns the steps that compute a gradient. The value of each step is the number by which its gradient is multiplied.

        Args:
            factors: Factor of the guidance scale at each step. It is 0 at steps without guidance.
            jumps: Steps before which noise is added, in ascending order. No gradient is reused across them.
        """
        guided = [step for step, factor in enumerate(factors) if factor]
        parts = [list(part) for _, part in groupby(guided, key=lambda step: bisect(jumps, step))]
        groups = [part[first : first + self.every] for part in parts for first in range(0, len(part), self.every)]
        return {group[0]: len(group) if self.skipped == "sum" else 1 for group in groups}
