"""Runs of a UNet that is given the noise level: Karras et al. 2022 (arXiv 2206.00364) and Song et al. 2023 (arXiv 2303.01469).

The class of the scheduler selects the method. Only `EDMDPMSolverMultistepScheduler` takes the steps itself. Other stock schedulers
compute the noise levels from betas, or add noise after the UNet has been evaluated.
"""

import copy
import math

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

from diffusers_adm.checks import is_integer
from diffusers_adm.respacing import check_consistency_steps, consistency_steps
from diffusers_adm.solvers.karras import Churn, Evaluation, KarrasSolver, ancestral_evaluations, churned_solver
from diffusers_adm.solvers.levels import check_own_range, check_sigmas
from diffusers_adm.solvers.multistep import begun_at
from diffusers_adm.solvers.visits import Restart, Route, check_route


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
        route: Order of the steps.
    """

    def __init__(self, scheduler: EDMDPMSolverMultistepScheduler, levels: list[float], route: Route):
        super().__init__(scheduler, [Evaluation(*step) for step in zip(levels, levels[1:])], levels[0], route)
        self.prepared = copy.deepcopy(scheduler)
        self.prepared.set_timesteps(len(levels) - 1)
        self.prepared.sigmas = torch.tensor(levels)
        # The copy is given x_0, because the UNet applies the preconditioning itself.
        self.prepared.precondition_outputs = lambda sample, model_output, sigma: model_output
        self.begin_part(self.visits[0])

    def begin_part(self, index: int) -> None:
        """Begins with a copy of the scheduler without earlier predictions. The argument is that of `Solver.begin_part`."""
        self.scheduler = begun_at(self.prepared, len(self.schedule) - 1 - index)

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
    sigmas: list[float] | None = None,
    restart: Restart | dict | list | None = None,
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
        sigmas: Noise levels to visit, in the order of the run, without its end. They override the number of steps.
        restart: Parts of the run that are repeated.

    Raises:
        ValueError: If the scheduler is not supported, or an argument is out of its range or does not fit the scheduler.
    """
    check_sigma_scheduler(scheduler)
    name, churn = type(scheduler).__name__, Churn.parse(churn)
    # Steps of a consistency model are numbers, not a list of noise levels to visit.
    route = Route.of_call(None if sigmas is None else timesteps, sigmas, restart)
    if eta:
        raise ValueError(f"`eta` requires DDIMScheduler, but got {eta} with {name}.")
    without_churn = (CMStochasticIterativeScheduler, EulerAncestralDiscreteScheduler, EDMDPMSolverMultistepScheduler)
    if isinstance(scheduler, without_churn) and churn.s_churn:
        raise ValueError(f"`churn` must not be given with {name}, which does not support it, but got {churn}.")
    if isinstance(scheduler, (*EDM_SCHEDULERS, CMStochasticIterativeScheduler)):
        check_own_range(scheduler, sigma_range)
    if sigmas is not None:
        check_sigmas(sigmas, sigma_range)
    check_route(scheduler, route, adds_noise=bool(churn.s_churn))
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return consistency_solver(scheduler, num_inference_steps, timestep_respacing, timesteps, sigmas)
    for argument, given in (("timesteps", timesteps), ("timestep_respacing", timestep_respacing)):
        if given is not None:
            raise ValueError(
                f"`{argument}` requires CMStochasticIterativeScheduler, but got {given!r} with {name}. Pass `sigmas` instead."
            )
    if sigmas is None:
        _check_number(num_inference_steps, scheduler.config.num_train_timesteps)
        levels = karras_levels(scheduler, sigma_range, num_inference_steps)
    else:
        visited = sorted(set(sigmas), reverse=True)
        levels = [*visited, karras_levels(scheduler, sigma_range, len(visited))[-1]]
        if levels[-1] >= levels[-2]:
            raise ValueError(
                f"`sigmas` must be above {levels[-1]:.4g}, where the run of this {name} ends, but got {sigmas}."
            )
    if isinstance(scheduler, EDMDPMSolverMultistepScheduler):
        return MultistepSolver(scheduler, levels, route)
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        return KarrasSolver(scheduler, ancestral_evaluations(levels), levels[0], route)
    return churned_solver(scheduler, levels, route, churn)


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


def consistency_solver(
    scheduler: CMStochasticIterativeScheduler,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    timesteps: list[int] | None,
    sigmas: list[float] | None,
) -> ConsistencySolver:
    """
    Returns a run of a consistency model. The arguments are those of `build_sigma_solver`.

    Raises:
        ValueError: If numbered steps do not begin at the highest noise level and go down.
    """
    if sigmas is None:
        sigmas = consistency_levels(scheduler, num_inference_steps, timestep_respacing, timesteps)
    lowest = scheduler.config.sigma_min
    noises = [None, *(math.sqrt(max(sigma**2 - lowest**2, 0)) for sigma in sigmas[1:])]
    targets = [lowest] * (len(sigmas) - 1) + [0.0]
    return ConsistencySolver(scheduler, [Evaluation(*one) for one in zip(sigmas, targets, noises)], sigmas[0])


def consistency_levels(
    scheduler: CMStochasticIterativeScheduler,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    timesteps: list[int] | None,
) -> list[float]:
    """
    Returns the noise levels of the steps of a consistency model. The arguments are those of `build_sigma_solver`.

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
    return prepared.sigmas[: len(places)].double().tolist()


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
