"""Sampling over noise levels: Karras et al. 2022 (arXiv 2206.00364) and Song et al. 2023 (arXiv 2303.01469).

A UNet with preconditioning is given the noise level. Other UNets are sampled here if noise is added before each step (churn).
"""

import math
from dataclasses import dataclass, replace

import torch
from diffusers import HeunDiscreteScheduler, KDPM2DiscreteScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.checks import is_number
from diffusers_adm.diffusion import NoiseSchedule, timestep_at
from diffusers_adm.solvers.algorithms import EpsilonSolver
from diffusers_adm.solvers.visits import Route


@dataclass(frozen=True)
class Churn:
    """
    Noise that is added before each step of Euler's and Heun's method and DPM-Solver-2 (Karras et al. 2022, Algorithm 2).

    Args:
        s_churn: Amount of noise of the whole run, at least 0. A step raises its noise level by `s_churn` divided by the number
            of steps, and at most by sqrt(2) - 1.
        s_tmin: Lowest noise level at which noise is added.
        s_tmax: Highest noise level at which noise is added.
        s_noise: Factor on the standard deviation of the added noise.

    Raises:
        ValueError: If a number is out of its range.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value and (value < math.inf or name == "s_tmax")):
                raise ValueError(f"`{name}` of churn must be a number of at least 0, but got {value!r}.")

    @classmethod
    def parse(cls, given: "Churn | dict | None") -> "Churn":
        """
        Returns churn that was given as an object, as a dict, or as `None` for the defaults.

        Raises:
            ValueError: If `given` has another type, or the dict has a name that is not an option.
        """
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"`churn` must be a Churn or a dict of its options, but got {given!r}.")
        unknown = [name for name in given or {} if name not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"`churn` takes the options {tuple(cls.__dataclass_fields__)}, but got {unknown}.")
        return cls(**(given or {}))

    def raised(self, sigma: float, steps: int) -> float:
        """
        Returns the noise level of a step after its noise has been added.

        Args:
            sigma: Noise level that the step begins at.
            steps: Number of steps of the run.
        """
        acts = self.s_tmin <= sigma <= self.s_tmax
        return sigma * (1 + min(self.s_churn / steps, math.sqrt(2) - 1)) if acts else sigma


@dataclass(frozen=True)
class Evaluation:
    """
    One evaluation of the UNet, and the update that follows it.

    Args:
        sigma: Noise level at which the UNet is evaluated.
        target: Noise level after the update.
        noise: Standard deviation of the noise that is added before the evaluation. `None` draws no noise. 0 draws noise without
            effect, as the original code does, so that each seed draws the same image.
        origin: Noise level at the beginning of the step, for its second evaluation. `None` for the first evaluation.
        weight: Weight of the slope of the second evaluation. The slope of the first evaluation has the weight 1 - `weight`.
    """

    sigma: float
    target: float
    noise: float | None = None
    origin: float | None = None
    weight: float = 1.0


class KarrasSolver(EpsilonSolver):
    """
    One run over the noise levels of Karras et al. 2022. The images are x_0 + sigma * epsilon. Between steps they are divided by
    sqrt(1 + sigma^2), so that guidance functions, callbacks and classifiers are given x_t in the usual scale.

    Args:
        scheduler: Scheduler that the run belongs to.
        evaluations: Evaluations of the UNet, from the highest noise level down.
        start: Noise level at which the run begins, before noise is added.
        route: Order of the steps. `None` means from the highest noise level down.
        trained: Noise schedule of a UNet that is given timesteps. `None` for a UNet that is given the noise level.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        evaluations: list[Evaluation],
        start: float,
        route: Route | None = None,
        trained: NoiseSchedule | None = None,
    ):
        self.start = start
        self.evaluations = list(reversed(evaluations))  # in the order of the schedule, least noisy first
        sigmas = torch.tensor([evaluation.sigma for evaluation in self.evaluations], dtype=torch.float64)
        timesteps = sigmas if trained is None else timestep_at(trained, sigmas)
        schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), timesteps.float())
        starts = [index for index, evaluation in enumerate(self.evaluations) if evaluation.origin is None]
        visits = None if route is None else route.visits(sigmas.tolist(), starts)
        super().__init__(scheduler, schedule, scheduler, schedule.timesteps, visits, starts=starts)
        if trained is None:
            self.prediction_type = "sample"  # UNets with preconditioning always predict x_0
        else:
            self.start = math.sqrt(1 + start**2)  # as in other solvers, x_T is x_t at the first noise level

    def begin(
        self, x_T: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Returns the images at the first noise level. The arguments are those of `Solver.begin`."""
        return self.raise_noise(self.start * x_T, self.evaluations[-1], generator)

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns the images at the target of an evaluation, from the guided x_0."""
        evaluation = self.evaluations[index]
        x, origin = x_t * math.sqrt(1 + evaluation.sigma**2), evaluation.sigma
        slope = (x - x_0) / evaluation.sigma  # dx / dsigma [Karras et al. 2022, Algorithm 1]
        if evaluation.origin is None:
            self.first = x, slope
        else:
            x, first_slope = self.first
            slope = evaluation.weight * slope + (1 - evaluation.weight) * first_slope
            origin = evaluation.origin
        return (x + (evaluation.target - origin) * slope) / math.sqrt(1 + evaluation.target**2)

    def change_epsilon(self, change: torch.Tensor, index: int) -> None:
        """Changes images and slope of the first evaluation of a step. The arguments are those of `Solver.change_epsilon`."""
        origin = self.evaluations[index].origin
        if origin is not None:
            x, slope = self.first
            self.first = x + origin * change, slope + change

    def renoise(
        self, x: torch.Tensor, step: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Adds the noise of the next evaluation, or of a jump to it. The arguments are those of `Solver.renoise`."""
        if step + 1 == len(self.visits):
            return x
        before = self.evaluations[self.visits[step]].target
        evaluation = self.evaluations[self.visits[step + 1]]
        if self.jumps_to(step + 1):
            self.begin_part(self.visits[step + 1])
            evaluation = replace(evaluation, noise=math.sqrt(evaluation.sigma**2 - before**2))
        return self.raise_noise(x * math.sqrt(1 + before**2), evaluation, generator)

    def raise_noise(
        self,
        x: torch.Tensor,
        evaluation: Evaluation,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Returns the x_t at which the UNet is evaluated.

        Args:
            x: Images x_0 + sigma * epsilon before noise is added, `(batch, channels, height, width)`.
            evaluation: Evaluation that the noise is added for.
            generator: Generator of the noise, one for all images or one per image.
        """
        if evaluation.noise is not None:
            x = x + evaluation.noise * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x / math.sqrt(1 + evaluation.sigma**2)


def churned_solver(
    scheduler: SchedulerMixin,
    levels: list[float],
    route: Route,
    churn: Churn,
    trained: NoiseSchedule | None = None,
) -> KarrasSolver:
    """
    Returns a run of Euler's or Heun's method or DPM-Solver-2 with churn.

    Args:
        scheduler: Scheduler of the run.
        levels: Noise levels of the run, including its end.
        route: Order of the steps.
        churn: Noise that is added before each step.
        trained: Noise schedule of a UNet that is given timesteps. Churn does not exceed its highest noise level.
    """
    highest = math.inf if trained is None else trained.sigma[-1].item()
    evaluations = churned_evaluations(levels, churn, _second_evaluation(scheduler), highest)
    return KarrasSolver(scheduler, evaluations, levels[0], route, trained)


def _second_evaluation(scheduler: SchedulerMixin) -> str | None:
    if isinstance(scheduler, HeunDiscreteScheduler):
        return "end"
    return "middle" if isinstance(scheduler, KDPM2DiscreteScheduler) else None


def churned_evaluations(
    levels: list[float], churn: Churn, second: str | None, highest: float = math.inf
) -> list[Evaluation]:
    """
    Returns the evaluations of a run of first or second order [Karras et al. 2022, Algorithm 2].

    Args:
        levels: Noise levels of the run, including its end.
        churn: Noise that is added before each step.
        second: Place of each step's second evaluation: `"end"` (Heun's method), `"middle"` (DPM-Solver-2, the middle of a schedule
            with rho = 3), or `None` for no second evaluation (Euler's method).
        highest: Noise level that churn does not exceed.
    """
    evaluations = []
    for sigma, target in zip(levels, levels[1:]):
        raised = max(sigma, min(churn.raised(sigma, len(levels) - 1), highest))
        noise = churn.s_noise * math.sqrt(raised**2 - sigma**2) if churn.s_churn else None
        if second is None or (second == "end" and target == 0):
            evaluations.append(Evaluation(raised, target, noise))
        elif second == "end":
            evaluations.append(Evaluation(raised, target, noise))
            evaluations.append(Evaluation(target, target, origin=raised, weight=0.5))
        else:
            middle = ((raised ** (1 / 3) + target ** (1 / 3)) / 2) ** 3
            evaluations.append(Evaluation(raised, middle, noise))
            evaluations.append(Evaluation(middle, target, origin=raised))
    return evaluations


def ancestral_evaluations(levels: list[float]) -> list[Evaluation]:
    """Returns the evaluations of a run whose Euler steps go below the next noise level. Noise is then added up to that level."""
    evaluations, noise = [], None
    for sigma, target in zip(levels, levels[1:]):
        below = target**2 / sigma
        evaluations.append(Evaluation(sigma, below, noise))
        noise = math.sqrt(target**2 - below**2)
    return evaluations
