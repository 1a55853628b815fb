"""Sampling with a UNet that is given the noise level: Karras et al. 2022 (arXiv 2206.00364) and Song et al. 2023 (arXiv 2303.01469).

The class of the scheduler selects the method. Only `EDMDPMSolverMultistepScheduler` takes the steps itself. Other stock schedulers
compute the noise levels from betas, or add noise after the UNet has been evaluated.
"""

import copy
import math
from dataclasses import dataclass

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.checks import is_integer, is_number
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.respacing import check_consistency_steps, consistency_steps
from diffusers_adm.solvers.algorithms import EpsilonSolver


SIGMA_SCHEDULERS = (
    HeunDiscreteScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    EDMDPMSolverMultistepScheduler,
    CMStochasticIterativeScheduler,
)
# Schedulers that have noise levels of their own.
EDM_SCHEDULERS = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)


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
        evaluations: Evaluations of the UNet, in the order of the run.
        start: Noise level at which the run begins, before noise is added.
    """

    def __init__(self, scheduler: SchedulerMixin, evaluations: list[Evaluation], start: float):
        self.start = start
        self.evaluations = list(reversed(evaluations))  # in the order of the schedule, least noisy first
        sigmas = torch.tensor([evaluation.sigma for evaluation in self.evaluations], dtype=torch.float64)
        schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), sigmas.float())
        super().__init__(scheduler, schedule, copy.copy(scheduler), schedule.timesteps)
        self.prediction_type = "sample"  # UNets with preconditioning always predict x_0

    @property
    def entries(self) -> dict[int, float]:
        """Noise level of each step of the run at which the run may begin. It may not begin at the second evaluation of a step."""
        first = {step for step, index in enumerate(self.visits) if self.evaluations[index].origin is None}
        return {step: sigma for step, sigma in super().entries.items() if step in first}

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

    def renoise(
        self, x: torch.Tensor, step: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Adds the noise of the next evaluation. The arguments are those of `Solver.renoise`."""
        if step + 1 == len(self.visits):
            return x
        before = self.evaluations[self.visits[step]].target
        return self.raise_noise(x * math.sqrt(1 + before**2), self.evaluations[self.visits[step + 1]], generator)

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


class ConsistencySolver(KarrasSolver):
    """
    One run of a consistency model (Song et al. 2023, Algorithm 1). The last predicted x_0 is the result. Noise is added again to each
    earlier one.
    """

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns x_0. In all steps but the last, it is scaled like images at the lowest noise level."""
        return x_0 / math.sqrt(1 + self.evaluations[index].target ** 2)


class MultistepSolver(KarrasSolver):
    """
    One run of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), whose steps a copy of the scheduler takes.

    Args:
        scheduler: Scheduler that the run belongs to.
        levels: Noise levels of the run, including its end.
    """

    def __init__(self, scheduler: EDMDPMSolverMultistepScheduler, levels: list[float]):
        super().__init__(scheduler, [Evaluation(*step) for step in zip(levels, levels[1:])], levels[0])
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(len(levels) - 1)
        self.scheduler.set_begin_index(0)
        # The copy is given x_0, because the UNet applies the preconditioning itself.
        self.scheduler.precondition_outputs = lambda sample, model_output, sigma: model_output

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns the images at the target of an evaluation, from the guided x_0."""
        evaluation = self.evaluations[index]
        x = x_t * math.sqrt(1 + evaluation.sigma**2)
        stepped = self.scheduler.step(x_0, self.timesteps[index], x, **step_kwargs).prev_sample
        return stepped / math.sqrt(1 + evaluation.target**2)


def build_sigma_solver(
    scheduler: SchedulerMixin,
    sigma_range: tuple[float, float],
    num_inference_steps: int | None,
    timestep_respacing: str | None = None,
    timesteps: list[int] | None = None,
    eta: float = 0.0,
    churn: Churn | dict | None = None,
) -> KarrasSolver:
    """
    Prepares one run of a UNet that is given the noise level.

    Args:
        scheduler: One of `SIGMA_SCHEDULERS`. It is not changed.
        sigma_range: Lowest and highest noise level of the UNet. `EDM_SCHEDULERS` and `CMStochasticIterativeScheduler` use the noise
            levels of their config instead.
        num_inference_steps: Number of steps.
        timestep_respacing: Steps of `CMStochasticIterativeScheduler` in the format of `--ts` of the original code, such as
            `"0,22,39"`. The last number has no effect if there are several. The string overrides `num_inference_steps`.
        timesteps: Steps of `CMStochasticIterativeScheduler` in the format of the scheduler, such as `[22, 0]`. They override
            `num_inference_steps` and `timestep_respacing`.
        eta: Noise of DDIM, which must be 0.
        churn: Noise that is added before each step of Euler's and Heun's method and DPM-Solver-2.

    Raises:
        ValueError: If the scheduler is not supported, or an argument is out of its range or does not fit the scheduler.
    """
    check_sigma_scheduler(scheduler)
    name, churn = type(scheduler).__name__, Churn.parse(churn)
    if eta:
        raise ValueError(f"`eta` requires DDIMScheduler, but got {eta} with {name}.")
    without_churn = (CMStochasticIterativeScheduler, EulerAncestralDiscreteScheduler, EDMDPMSolverMultistepScheduler)
    if isinstance(scheduler, without_churn) and churn.s_churn:
        raise ValueError(f"`churn` must not be given with {name}, which does not support it, but got {churn}.")
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return consistency_solver(scheduler, num_inference_steps, timestep_respacing, timesteps)
    for argument, given in (("timesteps", timesteps), ("timestep_respacing", timestep_respacing)):
        if given is not None:
            raise ValueError(f"`{argument}` requires CMStochasticIterativeScheduler, but got {given!r} with {name}.")
    _check_number(num_inference_steps, scheduler.config.num_train_timesteps)
    levels = karras_levels(scheduler, sigma_range, num_inference_steps)
    if isinstance(scheduler, EDMDPMSolverMultistepScheduler):
        return MultistepSolver(scheduler, levels)
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        evaluations = ancestral_evaluations(levels)
    else:
        evaluations = churned_evaluations(levels, churn, _second_evaluation(scheduler))
    return KarrasSolver(scheduler, evaluations, levels[0])


def karras_levels(
    scheduler: SchedulerMixin, sigma_range: tuple[float, float], num_inference_steps: int
) -> list[float]:
    """Returns the `num_inference_steps + 1` noise levels of a run, including its end [Karras et al. 2022, eq. 5]."""
    if isinstance(scheduler, EDM_SCHEDULERS):
        prepared = copy.deepcopy(scheduler)
    else:
        prepared = EDMEulerScheduler(sigma_min=sigma_range[0], sigma_max=sigma_range[1])
    prepared.set_timesteps(num_inference_steps)
    return prepared.sigmas.double().tolist()


def _second_evaluation(scheduler: SchedulerMixin) -> str | None:
    if isinstance(scheduler, HeunDiscreteScheduler):
        return "end"
    return "middle" if isinstance(scheduler, KDPM2DiscreteScheduler) else None


def churned_evaluations(levels: list[float], churn: Churn, second: str | None) -> list[Evaluation]:
    """
    Returns the evaluations of a run of first or second order [Karras et al. 2022, Algorithm 2].

    Args:
        levels: Noise levels of the run, including its end.
        churn: Noise that is added before each step.
        second: Place of each step's second evaluation: `"end"` (Heun's method), `"middle"` (DPM-Solver-2, the middle of a schedule
            with rho = 3), or `None` for no second evaluation (Euler's method).
    """
    evaluations = []
    for sigma, target in zip(levels, levels[1:]):
        raised = churn.raised(sigma, len(levels) - 1)
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


def consistency_solver(
    scheduler: CMStochasticIterativeScheduler,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    timesteps: list[int] | None,
) -> ConsistencySolver:
    """
    Returns a run of a consistency model. The arguments are those of `build_sigma_solver`.

    Raises:
        ValueError: If the steps do not begin at the highest noise level and go down.
    """
    config = scheduler.config
    if timesteps is not None:
        is_list = isinstance(timesteps, (list, tuple)) and all(map(is_integer, timesteps))
        places = list(reversed(timesteps)) if is_list else []
        check_consistency_steps(places, config.num_train_timesteps, f"timesteps={timesteps!r}")
    elif timestep_respacing is not None:
        places = consistency_steps(timestep_respacing, config.num_train_timesteps)
    else:
        _check_number(num_inference_steps, config.num_train_timesteps)
        stride = config.num_train_timesteps // num_inference_steps
        places = [step * stride for step in range(num_inference_steps)]
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(timesteps=places[::-1])
    levels, lowest = prepared.sigmas[: len(places)].double().tolist(), config.sigma_min
    noises = [None, *(math.sqrt(max(sigma**2 - lowest**2, 0)) for sigma in levels[1:])]
    targets = [lowest] * (len(places) - 1) + [0.0]
    return ConsistencySolver(scheduler, [Evaluation(*one) for one in zip(levels, targets, noises)], levels[0])


def check_sigma_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` if the scheduler does not support UNets that are given the noise level."""
    if not isinstance(scheduler, SIGMA_SCHEDULERS):
        names = ", ".join(supported.__name__ for supported in SIGMA_SCHEDULERS)
        raise ValueError(
            f"{type(scheduler).__name__} is not supported for a UNet with preconditioning, which is given the noise level. Use one of"
            f" {names}."
        )
    config = scheduler.config
    if config.get("algorithm_type") == "sde-dpmsolver++" and config.solver_order > 2:
        raise ValueError(
            f"algorithm_type='sde-dpmsolver++' requires a `solver_order` of 1 or 2, but got {config.solver_order}."
        )
    if isinstance(scheduler, CMStochasticIterativeScheduler) and config.num_train_timesteps < 2:
        raise ValueError(
            "`num_train_timesteps` of CMStochasticIterativeScheduler must be at least 2, because the noise levels lie between two"
            f" ends, but got {config.num_train_timesteps}."
        )


def _check_number(num_inference_steps: int | None, most: int) -> None:
    if not (is_integer(num_inference_steps) and 1 <= num_inference_steps <= most):
        raise ValueError(f"`num_inference_steps` must be an integer in [1, {most}], but got {num_inference_steps!r}.")
