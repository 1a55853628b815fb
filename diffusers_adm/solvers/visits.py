"""Order in which a run visits its noise levels: lists of the caller, and jumps back to a higher noise level.

Evaluations of the network are numbered as the steps of a [`NoiseSchedule`]: number 0 is the least noisy one. Two consecutive numbers
that do not go down are a jump. Noise is added then, see `Solver.renoise`.
"""

import math
from dataclasses import dataclass, fields

from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
)

from diffusers_adm.checks import is_integer, is_number


# Schedulers whose steps always add noise.
STOCHASTIC = (DDPMScheduler, EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler, SASolverScheduler)

ROUNDING = 1e-5  # relative, because schedulers round their noise levels to float32


@dataclass(frozen=True)
class Restart:
    """
    Part of a run that is repeated (Restart, Xu et al. 2023, arXiv 2306.14878). Whenever the run arrives at the lowest noise level of
    the part, noise is added up to its highest noise level. The part consists of the steps of the run between the two noise levels.

    Args:
        sigma_min: Lowest noise level sigma = sqrt((1 - alpha_bar) / alpha_bar).
        sigma_max: Highest noise level.
        times: Number of repetitions.

    Raises:
        ValueError: If a number is out of its range.
    """

    sigma_min: float
    sigma_max: float
    times: int = 1

    def __post_init__(self):
        levels = (self.sigma_min, self.sigma_max)
        if not (all(map(is_number, levels)) and 0 <= self.sigma_min < self.sigma_max < math.inf):
            raise ValueError(f"`restart` must have 0 <= sigma_min < sigma_max, but got {levels}.")
        if not (is_integer(self.times) and self.times >= 1):
            raise ValueError(f"`times` of restart must be an integer of at least 1, but got {self.times!r}.")

    @classmethod
    def parse(cls, given: "Restart | dict | list | None") -> "tuple[Restart, ...]":
        """
        Returns restarts that were given as one object or dict, as a list of them, or as `None` for no restart.

        Raises:
            ValueError: If `given` has another type, or a dict does not have the options of a restart.
        """
        names = tuple(field.name for field in fields(cls))
        restarts = []
        for one in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
            if isinstance(one, dict) and {"sigma_min", "sigma_max"} <= one.keys() <= set(names):
                one = cls(**one)
            if not isinstance(one, cls):
                raise ValueError(
                    f"`restart` must be a Restart, a dict of its options {names}, or a list, but got {one!r}."
                )
            restarts.append(one)
        return tuple(restarts)


def restarted_visits(sigmas: list[float], starts: list[int], restarts: tuple[Restart, ...]) -> list[int]:
    """
    Returns the evaluations of a run with restarts, in the order of the run.

    Args:
        sigmas: Noise level of each evaluation, least noisy first.
        starts: Evaluations with which a step begins.
        restarts: Parts of the run that are repeated.

    Raises:
        ValueError: If there is no whole step of the run between the two noise levels of a restart.
    """
    again: dict[int, list[int]] = {}
    for restart in restarts:
        low, high = restart.sigma_min * (1 - ROUNDING), restart.sigma_max * (1 + ROUNDING)
        part = [index for index in starts if low <= sigmas[index] <= high]
        if len(part) < 2:
            levels = ", ".join(f"{sigmas[index]:.3g}" for index in reversed(starts))
            raise ValueError(
                f"`restart` must contain two or more noise levels of the run, but got {restart}. The run has {levels}."
            )
        again.setdefault(min(part), []).extend([*range(max(part), min(part), -1)] * restart.times)
    return [visit for index in reversed(range(len(sigmas))) for visit in (*again.get(index, ()), index)]


def listed_visits(listed: list[float], name: str, starts: list[int]) -> list[int]:
    """
    Returns the evaluations of a run over listed steps, in the order of the run.

    Args:
        listed: Timesteps or noise levels in the order of the run.
        name: Name of the argument, for error messages.
        starts: Evaluation with which each step begins, least noisy first.

    Raises:
        ValueError: If the list skips an entry on the way down that it visits elsewhere, or does not begin with the noisiest entry and
            end with the least noisy one.
    """
    values = sorted(set(listed))
    place = {value: index for index, value in enumerate(values)}
    steps = [place[value] for value in listed]
    if listed[0] != values[-1]:
        raise ValueError(f"`{name}` must begin with the noisiest one, {values[-1]}, but got {list(listed)}.")
    for before, after in zip(steps, steps[1:]):
        if after < before - 1:
            raise ValueError(
                f"`{name}` must not skip an entry on the way down that they visit elsewhere, but the step from {values[before]} to"
                f" {values[after]} skips {values[before - 1]}."
            )
    if steps[-1] != 0:
        raise ValueError(f"`{name}` must end with the least noisy one, {values[0]}, but got {list(listed)}.")
    return [index for step in steps for index in range(starts[step], starts[step - 1] if step else -1, -1)]


@dataclass(frozen=True)
class Route:
    """
    Order of the steps of a run.

    Args:
        name: Name of the argument that lists the steps, or `None` without a list.
        listed: Timesteps or noise levels in the order of the run.
        restarts: Parts of the run that are repeated.
    """

    name: str | None
    listed: list[float]
    restarts: tuple[Restart, ...]

    @classmethod
    def of_call(
        cls, timesteps: list[int] | None, sigmas: list[float] | None, restart: Restart | dict | list | None
    ) -> "Route":
        """
        Returns the order that the arguments of a call describe.

        Raises:
            ValueError: If steps are listed twice, or `restart` is not valid.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError(
                f"`timesteps` and `sigmas` both list the steps, but got {timesteps} and {sigmas}. Pass one."
            )
        restarts = Restart.parse(restart)
        if timesteps is not None:
            return cls("timesteps", timesteps, restarts)
        return cls(None, [], restarts) if sigmas is None else cls("sigmas", sigmas, restarts)

    @property
    def jumps(self) -> bool:
        """Whether the list goes back to a noise level that is as high or higher."""
        return any(after >= before for before, after in zip(self.listed, self.listed[1:]))

    def visits(self, sigmas: list[float], starts: list[int] | None = None) -> list[int]:
        """
        Returns the evaluations of the run, in its order.

        Args:
            sigmas: Noise level of each evaluation, least noisy first.
            starts: Evaluations with which a step begins, least noisy first. `None` means all.

        Raises:
            ValueError: If the run cannot take this order.
        """
        starts = list(range(len(sigmas))) if starts is None else starts
        if self.jumps:
            return listed_visits(self.listed, self.name, starts)
        return restarted_visits(sigmas, starts, self.restarts)


def check_route(scheduler: SchedulerMixin, route: Route, adds_noise: bool = False) -> None:
    """
    Checks that a scheduler can take the steps of a run in their order.

    Args:
        scheduler: Scheduler of the run.
        route: Order of the steps.
        adds_noise: Whether an option of the call adds noise in each step.

    Raises:
        ValueError: If the scheduler cannot go back, or a restart is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    reason, advice = None, "Use a solver without noise, such as HeunDiscreteScheduler."
    if isinstance(scheduler, PNDMScheduler):
        reason = "which takes its first step twice"
    elif isinstance(scheduler, CMStochasticIterativeScheduler):
        reason = "whose steps all lead to x_0"
    elif route.jumps and isinstance(scheduler, DPMSolverSinglestepScheduler) and config.solver_order > 1:
        reason = "whose steps are groups of several entries"
    if route.jumps and reason is not None:
        raise ValueError(f"`{route.name}` must go down with {name}, {reason}, but got {list(route.listed)}.")
    if not route.restarts:
        return
    if isinstance(scheduler, STOCHASTIC) or config.get("algorithm_type", "").startswith("sde"):
        reason = "whose steps add noise already"
    elif adds_noise:
        reason, advice = "if `eta` or `churn` adds noise in each step", "Leave out either."
    if reason is not None:
        raise ValueError(f"`restart` is not supported with {name}, {reason}. {advice}")
    if route.jumps:
        raise ValueError(f"`restart` requires `{route.name}` that only go down, but got {list(route.listed)}.")
