"""Preparation of diffusers schedulers for one run that samples as the original code does."""

import copy
import warnings
from typing import TypedDict

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_adm.betas import betas_from_config
from diffusers_adm.checks import check_types, is_integer, is_number
from diffusers_adm.choices import PREDICTION_TYPES
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.respacing import evenly_spaced_timesteps, respaced_timesteps, trailing_timesteps
from diffusers_adm.solvers.algorithms import HIGH_NOISE_LEVEL, DDPMSolver, EpsilonSolver
from diffusers_adm.solvers.karras import Churn, churned_solver
from diffusers_adm.solvers.levels import (
    TWO_STAGE,
    listed_schedule,
    make_ancestral_levels_exact,
    noise_levels,
    place_levels,
)
from diffusers_adm.solvers.multistep import PNDMSolver, SigmaSolver, VarianceExplodingSolver
from diffusers_adm.solvers.visits import Restart, Route, check_route


# Schedulers whose noised images are x_0 + sigma * epsilon.
VARIANCE_EXPLODING = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, *TWO_STAGE)
SUPPORTED_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    SASolverScheduler,
    PNDMScheduler,
    *VARIANCE_EXPLODING,
)
# Settings that the authors of fast solvers recommend for guided sampling of pixels: second order and dynamic thresholding (README of
# github.com/LuChengTHU/dpm-solver, documentation of UniPC in diffusers). `sample_max_value` is raised, because its default of 1 would
# turn thresholding into clipping.
_THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1000.0}
GUIDED_SETTINGS = {
    DPMSolverMultistepScheduler: {"algorithm_type": "dpmsolver++", "solver_order": 2, **_THRESHOLDING},
    # The corrector is off in the first step, where it is unstable with strong guidance.
    UniPCMultistepScheduler: {"solver_type": "bh2", "solver_order": 2, "disable_corrector": [0], **_THRESHOLDING},
}


class SamplingConfig(TypedDict):
    """Entries of a scheduler's config that change how it samples. Each scheduler has some of them."""

    prediction_type: str
    timestep_spacing: str
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float


def build_solver(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    eta: float,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    churn: Churn | dict | None = None,
    restart: Restart | dict | list | None = None,
) -> DDPMSolver | EpsilonSolver:
    """
    Prepares a scheduler for one run.

    Args:
        scheduler: One of `SUPPORTED_SCHEDULERS`. It is not changed.
        num_inference_steps: Number of steps, in [1, num_train_timesteps]. DDPM and DDIM place them as the original code does if
            `timestep_spacing` is `"leading"` or `"linspace"`. If it is `"trailing"`, a run begins at the last timestep.
        timestep_respacing: Respacing string of the original code, for DDPM and DDIM. It overrides `num_inference_steps`.
        eta: Noise of DDIM, in [0, 1]. 0 is deterministic, and 1 is as noisy as DDPM.
        timesteps: Training timesteps to visit, in the order of the run. They override `num_inference_steps` and
            `timestep_respacing`.
        sigmas: Noise levels to visit instead, in the order of the run, without its end.
        churn: Noise that is added before each step of Euler's and Heun's method.
        restart: Parts of the run that are repeated.

    Raises:
        ValueError: If the scheduler is not supported, or an argument is out of its range or does not fit the scheduler.
    """
    check_scheduler(scheduler)
    _check_steps(scheduler, num_inference_steps, timestep_respacing, eta, timesteps, sigmas)
    config, churn, route = scheduler.config, Churn.parse(churn), Route.of_call(timesteps, sigmas, restart)
    if churn.s_churn and not isinstance(scheduler, (HeunDiscreteScheduler, EulerDiscreteScheduler)):
        name = type(scheduler).__name__
        raise ValueError(
            f"`churn` requires HeunDiscreteScheduler or EulerDiscreteScheduler, but got {churn} with {name}."
        )
    if timesteps is not None:
        schedule = NoiseSchedule.from_config(config, sorted(set(timesteps)))
    elif sigmas is not None:
        schedule = listed_schedule(NoiseSchedule.from_config(config), sigmas)
    elif takes_respacing(scheduler) or isinstance(scheduler, PNDMScheduler):
        visited = respaced_steps(scheduler, num_inference_steps, timestep_respacing)
        schedule = NoiseSchedule.from_config(config, visited)
    else:
        schedule = None  # the scheduler chooses the noise levels
    check_route(scheduler, route, adds_noise=bool(eta or churn.s_churn))
    if isinstance(scheduler, PNDMScheduler):
        return pndm_solver(scheduler, schedule)
    if isinstance(scheduler, DDIMScheduler):
        return ddim_solver(scheduler, schedule, eta, route.visits(schedule.sigma.tolist()))
    if isinstance(scheduler, DDPMScheduler):
        return DDPMSolver(scheduler, schedule, route.visits(schedule.sigma.tolist()))
    count = num_inference_steps if schedule is None else len(schedule)
    return sigma_solver(scheduler, count, schedule, route, churn)


def respaced_steps(
    scheduler: DDPMScheduler | DDIMScheduler | PNDMScheduler, count: int | None, timestep_respacing: str | None
) -> list[int]:
    """Returns the timesteps that a run visits without a list, in ascending order. The arguments are those of `build_solver`."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if timestep_respacing is not None:
        return respaced_timesteps(timestep_respacing, num_train_timesteps)
    if count == 1:
        return [num_train_timesteps - 1]  # the step begins with noise
    if scheduler.config.timestep_spacing == "trailing":
        return trailing_timesteps(count, num_train_timesteps)
    if isinstance(scheduler, (DDIMScheduler, PNDMScheduler)):
        return evenly_spaced_timesteps(count, num_train_timesteps)
    return respaced_timesteps(str(count), num_train_timesteps)


def _check_steps(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    eta: float,
    timesteps: list[int] | None,
    sigmas: list[float] | None,
) -> None:
    """Raises a `ValueError` if the scheduler cannot take the requested steps."""
    num_train_timesteps, name = scheduler.config.num_train_timesteps, type(scheduler).__name__
    if not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f"`eta` must be a number in [0, 1], but got {eta!r}.")
    if eta and not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"`eta` requires DDIMScheduler, but got {eta} with {name}.")
    if timesteps is not None and not (
        isinstance(timesteps, (list, tuple))
        and timesteps
        and all(is_integer(timestep) for timestep in timesteps)
        and all(0 <= timestep < num_train_timesteps for timestep in timesteps)
    ):
        raise ValueError(
            f"`timesteps` must be a list of one or more integers in [0, {num_train_timesteps - 1}], but got {timesteps}."
        )
    if timesteps is not None or sigmas is not None:
        return
    if timestep_respacing is None:
        if not (is_integer(num_inference_steps) and 1 <= num_inference_steps <= num_train_timesteps):
            raise ValueError(
                f"`num_inference_steps` must be an integer in [1, {num_train_timesteps}], the model's timesteps, but got"
                f" num_inference_steps={num_inference_steps}."
            )
    elif not takes_respacing(scheduler):
        raise ValueError(
            f"timestep_respacing={timestep_respacing!r} requires DDPMScheduler or DDIMScheduler, but the scheduler is {name}. Pass"
            " `num_inference_steps`, `timesteps` or `sigmas` instead."
        )


def ddim_solver(
    scheduler: DDIMScheduler, schedule: NoiseSchedule, eta: float, visits: list[int] | None = None
) -> EpsilonSolver:
    """Returns a run of DDIM over any list of timesteps."""
    prepared = respaced_copy(
        scheduler,
        schedule,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=0,
    )
    prepared.set_timesteps(len(schedule))
    if not scheduler.config.set_alpha_to_one:
        # float64: rounding to float32 would make the last variance negative.
        prepared.final_alpha_cumprod = NoiseSchedule.from_config(scheduler.config).alpha_bar[0]
    return EpsilonSolver(
        scheduler,
        schedule,
        prepared,
        timesteps=list(range(len(schedule))),
        visits=visits,
        max_x_0_shift=None,  # as in the original code
        eta=eta,
        use_clipped_model_output=scheduler.config.thresholding,  # epsilon must follow from the thresholded x_0
    )


def sigma_solver(
    scheduler: SchedulerMixin, count: int, schedule: NoiseSchedule | None, route: Route, churn: Churn
) -> EpsilonSolver:
    """
    Returns a run of a scheduler that steps through noise levels. One evaluation of the network counts as one step of the run.

    Args:
        scheduler: Scheduler of the run.
        count: Number of steps.
        schedule: Steps that the caller lists, least noisy first. `None` leaves the choice to the scheduler.
        route: Order of the steps.
        churn: Noise that is added before each step.

    Raises:
        ValueError: If the run would visit a timestep twice, or its order is not possible.
    """
    prepared = prepared_copy(scheduler, count)
    trained = NoiseSchedule.from_config(scheduler.config)
    if schedule is not None:
        place_levels(prepared, schedule, trained)
    if isinstance(scheduler, (EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        make_ancestral_levels_exact(prepared)
    levels = noise_levels(prepared)
    steps = torch.cat([levels[:-1:2], levels[-1:]]) if isinstance(scheduler, TWO_STAGE) else levels
    _check_levels(scheduler, steps, count)
    if churn.s_churn:
        return churned_solver(scheduler, steps.double().tolist(), route, churn, trained)
    timesteps = prepared.timesteps.flip(0)
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps  # MPS has no float64
    # The scheduler's own noise levels, because Karras sigmas lie between those of the training timesteps.
    sigmas = levels[:-1].double().flip(0)
    run_schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), timesteps)
    solver_class = VarianceExplodingSolver if isinstance(scheduler, VARIANCE_EXPLODING) else SigmaSolver
    starts = first_evaluations(prepared)
    visits = route.visits(sigmas.tolist(), starts)
    if levels[-1] > 0 and 0 in visits[:-1]:
        raise ValueError(
            f"`{route.name}` must not go back from {route.listed[-1]}, because {type(scheduler).__name__} ends at noise level"
            f" {levels[-1]:.3g} instead of 0, but got {list(route.listed)}."
        )
    entries = None if isinstance(scheduler, DPMSolverSinglestepScheduler) else starts
    solver = solver_class(scheduler, run_schedule, prepared, timesteps, visits, entries)
    if isinstance(scheduler, SASolverScheduler):
        solver.max_guidance_sigma = HIGH_NOISE_LEVEL  # later steps extrapolate an error of the first one
    return solver


def prepared_copy(scheduler: SchedulerMixin, count: int) -> SchedulerMixin:
    """Returns a copy of a scheduler that is set to a number of steps, and whose steps are given the guided x_0 or epsilon."""
    # The copy must neither clip x_0 nor expect a variance.
    off = {"variance_type": None, "clip_sample": False}
    changes = {name: value for name, value in off.items() if name in scheduler.config}
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        changes["lower_order_final"] = True  # as the scheduler does by itself, with a warning
    prediction_type = "epsilon" if isinstance(scheduler, VARIANCE_EXPLODING) else "sample"
    prepared = changed_copy(scheduler, prediction_type=prediction_type, **changes)
    prepared.set_timesteps(count)  # on the CPU, because reading a timestep from a GPU would wait for it
    prepared.is_scale_input_called = True  # x_t already has the scale that the network was trained on
    return prepared


def _check_levels(scheduler: SchedulerMixin, steps: torch.Tensor, count: int) -> None:
    """Raises a `ValueError` if the noise levels of the steps do not go down, and warns if a step is too long for its method."""
    name = type(scheduler).__name__
    # DEIS and SA-Solver may visit the lowest noise level twice, at the end.
    if not ((steps[:-1].diff() < 0).all() and steps[-1] <= steps[-2]):
        raise ValueError(
            f"`num_inference_steps` must be smaller, because {name} would visit a timestep twice, but got {count}."
        )
    if isinstance(scheduler, TWO_STAGE) and steps[0] > max(HIGH_NOISE_LEVEL, 1000 * steps[1]) and steps[1] > 0:
        warnings.warn(
            f"{name} goes from noise level {steps[0]:.0f} to {steps[1]:.2g} in one step, which oversaturates colours. Pass more steps"
            f" than num_inference_steps={count}, or use another scheduler.",
            stacklevel=2,
        )


def first_evaluations(prepared: SchedulerMixin) -> list[int]:
    """
    Returns the evaluations with which a step of a scheduler begins, least noisy first. Steps of DPM-Solver singlestep are groups of
    evaluations.

    Args:
        prepared: Scheduler whose steps have been set.
    """
    count = len(prepared.timesteps)
    if isinstance(prepared, TWO_STAGE):
        places = range(0, count, 2)
    elif isinstance(prepared, DPMSolverSinglestepScheduler):
        places = [place for place, order in enumerate(prepared.order_list) if order == 1]
    else:
        places = range(count)
    return [count - 1 - place for place in reversed(places)]


def full_config(scheduler: SchedulerMixin) -> dict:
    """
    Returns the config of a scheduler, for `from_config` of its class or another class. With the entry that is left out,
    `from_config` would replace all values that were defaults when the scheduler was built, even values that were changed later.
    """
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def changed_copy(scheduler: SchedulerMixin, **changes) -> SchedulerMixin:
    """Returns a copy of a scheduler with changes to its config. The steps of the copy are not set."""
    if not isinstance(scheduler, (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        return type(scheduler).from_config(full_config(scheduler), **changes)
    # These constructors set one step per training timestep, which takes longer than a short run. A deep copy avoids them.
    copied = copy.deepcopy(scheduler)
    copied.register_to_config(**changes)
    return copied


def pndm_solver(scheduler: PNDMScheduler, schedule: NoiseSchedule) -> PNDMSolver:
    """
    Returns a run of PNDM's pseudo linear multistep method. The method takes the first step twice. The second time, it also uses the
    evaluation at the end of the step.
    """
    prepared = respaced_copy(
        scheduler,
        schedule,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,  # otherwise the last evaluation would have no effect
    )
    prepared.set_timesteps(len(schedule))
    places = prepared.timesteps.flip(0)
    evaluated = NoiseSchedule.from_alpha_bar(schedule.alpha_bar[places], schedule.timesteps[places])
    return PNDMSolver(scheduler, evaluated, prepared, places)


def respaced_copy(scheduler: SchedulerMixin, schedule: NoiseSchedule, **changes) -> SchedulerMixin:
    """
    Returns a copy of a scheduler whose training timesteps are only the visited ones, numbered from 0. The previous timestep is then
    always the previous entry of the list. A stock scheduler computes a different previous timestep for most lists.
    """
    respaced = type(scheduler).from_config(
        full_config(scheduler), num_train_timesteps=len(schedule), trained_betas=schedule.beta.tolist(), **changes
    )
    respaced.alphas_cumprod = schedule.alpha_bar  # in float64, because the scheduler's own table is rounded
    return respaced


def takes_respacing(scheduler: SchedulerMixin) -> bool:
    """Returns whether a scheduler takes a respacing string."""
    return isinstance(scheduler, (DDPMScheduler, DDIMScheduler, CMStochasticIterativeScheduler))


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` if the scheduler or an option of its config is not supported."""
    if not isinstance(scheduler, SUPPORTED_SCHEDULERS):
        names = ", ".join(supported.__name__ for supported in SUPPORTED_SCHEDULERS)
        raise ValueError(f"{type(scheduler).__name__} is not supported. Use one of {names}.")
    config = scheduler.config
    check_types(SamplingConfig, config)
    ratio = config.get("dynamic_thresholding_ratio", 1.0)
    if not 0 <= ratio <= 1:
        raise ValueError(f"`dynamic_thresholding_ratio` must be in [0, 1], but got {ratio}.")
    for name in ("clip_sample_range", "sample_max_value"):
        if config.get(name, 1.0) <= 0:
            raise ValueError(f"`{name}` must be above 0, but got {config[name]}.")
    betas_from_config(config)
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, but got {config.prediction_type!r}.")
    if config.get("use_flow_sigmas"):
        raise ValueError("`use_flow_sigmas` must be False, because flow matching is not supported, but got True.")
    if isinstance(scheduler, PNDMScheduler) and not config.skip_prk_steps:
        raise ValueError(
            "`skip_prk_steps` must be True, because the Runge-Kutta steps of PNDMScheduler use wrong noise levels if their stride is"
            " odd, but got skip_prk_steps=False."
        )
