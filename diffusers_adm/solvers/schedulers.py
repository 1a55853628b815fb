"""diffusers' schedulers, prepared so that one run of each samples as the original code does."""

import copy
import warnings
from numbers import Real
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
from diffusers_adm.checks import check_types, is_integer
from diffusers_adm.diffusion import PREDICTION_TYPES, NoiseSchedule
from diffusers_adm.respacing import evenly_spaced_timesteps, respaced_timesteps, trailing_timesteps
from diffusers_adm.solvers.algorithms import (
    HIGH_NOISE_LEVEL,
    DDPMSolver,
    EpsilonSolver,
    PNDMSolver,
    VarianceExplodingSolver,
)


# Schedulers that evaluate the network twice per step, but once in the last.
TWO_STAGE = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
# Schedulers whose images keep their size, and have noise of standard deviation sigma added.
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
# Settings that the authors of fast solvers advise for guided sampling of pixels (README of github.com/LuChengTHU/dpm-solver;
# diffusers' page of UniPC): second order, and dynamic thresholding. A `sample_max_value` of 1, the default, would make that clipping.
_THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1000.0}
GUIDED_SETTINGS = {
    DPMSolverMultistepScheduler: {"algorithm_type": "dpmsolver++", "solver_order": 2, **_THRESHOLDING},
    # Strong guidance and the corrector do not go together in the first step.
    UniPCMultistepScheduler: {"solver_type": "bh2", "solver_order": 2, "disable_corrector": [0], **_THRESHOLDING},
}


class SamplingConfig(TypedDict):
    """Entries of schedulers' configs that say how to sample. Each scheduler has some of them."""

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
) -> DDPMSolver | EpsilonSolver:
    """
    Prepares a scheduler for one run.

    Args:
        scheduler: One of `SUPPORTED_SCHEDULERS`. It is left as it is.
        num_inference_steps: Number of steps, in [1, num_train_timesteps]. DDPM and DDIM place them as the original code does,
            whether `timestep_spacing` is `"leading"` or `"linspace"`, and up to the last timestep if it is `"trailing"`.
        timestep_respacing: Respacing string of the original code, for DDPM and DDIM. It wins over `num_inference_steps`.
        eta: Noise of DDIM, in [0, 1]: 0 is deterministic, 1 as noisy as DDPM.
        timesteps: Training timesteps to visit, in any order, for DDPM and DDIM. They win over both.

    Raises:
        ValueError: If the scheduler is not supported, or an argument is out of its range or does not fit the scheduler.
    """
    check_scheduler(scheduler)
    _check_steps(scheduler, num_inference_steps, timestep_respacing, eta, timesteps)
    config = scheduler.config
    if isinstance(scheduler, PNDMScheduler):
        evenly_spaced = evenly_spaced_timesteps(num_inference_steps, config.num_train_timesteps)
        return pndm_solver(scheduler, NoiseSchedule.from_config(config, evenly_spaced))
    if not takes_respacing(scheduler):
        return sigma_solver(scheduler, num_inference_steps)

    if timesteps is not None:
        visited = sorted(set(timesteps))
    elif timestep_respacing is not None:
        visited = respaced_timesteps(timestep_respacing, config.num_train_timesteps)
    elif config.timestep_spacing == "trailing":
        visited = trailing_timesteps(num_inference_steps, config.num_train_timesteps)
    elif isinstance(scheduler, DDIMScheduler):
        visited = evenly_spaced_timesteps(num_inference_steps, config.num_train_timesteps)
    else:
        visited = respaced_timesteps(str(num_inference_steps), config.num_train_timesteps)
    schedule = NoiseSchedule.from_config(config, visited)
    visits = visited_steps(schedule, timesteps)
    if isinstance(scheduler, DDIMScheduler):
        return ddim_solver(scheduler, schedule, eta, visits)
    return DDPMSolver(scheduler, schedule, visits)


def _check_steps(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    eta: float,
    timesteps: list[int] | None,
) -> None:
    """Raises a ValueError unless the scheduler can take the steps that are asked of it."""
    num_train_timesteps, name = scheduler.config.num_train_timesteps, type(scheduler).__name__
    if not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise ValueError(f"eta={eta!r} is not a number in [0, 1].")
    if eta and not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"eta={eta} is an option of DDIMScheduler, not of {name}.")
    if timesteps is not None and not (
        isinstance(timesteps, (list, tuple))
        and timesteps
        and all(is_integer(timestep) for timestep in timesteps)
        and all(0 <= timestep < num_train_timesteps for timestep in timesteps)
    ):
        raise ValueError(
            f"timesteps={timesteps} is not a list of one or more integers in [0, {num_train_timesteps - 1}]."
        )
    if timesteps is None and timestep_respacing is None:
        if not (is_integer(num_inference_steps) and 1 <= num_inference_steps <= num_train_timesteps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is not in [1, {num_train_timesteps}], the integers up to the"
                " number of the model's timesteps."
            )
    elif not takes_respacing(scheduler):
        given = f"timesteps={timesteps}" if timesteps is not None else f"timestep_respacing={timestep_respacing!r}"
        raise ValueError(f"{given} is for DDPMScheduler and DDIMScheduler; {name} places its own num_inference_steps.")


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
        # In float64 too, or the last variance is below zero.
        prepared.final_alpha_cumprod = NoiseSchedule.from_config(scheduler.config).alpha_bar[0]
    return EpsilonSolver(
        scheduler,
        schedule,
        prepared,
        timesteps=list(range(len(schedule))),
        visits=visits,
        max_x_0_shift=None,  # as in the original code
        eta=eta,
        use_clipped_model_output=scheduler.config.thresholding,  # epsilon is what a thresholded x_0 implies
    )


def sigma_solver(scheduler: SchedulerMixin, num_inference_steps: int) -> EpsilonSolver:
    """
    Returns a run of a scheduler that keeps its own noise levels (`sigmas`) and places its own timesteps. Each evaluation of
    the network is one step of the run.

    Raises:
        ValueError: If the run would visit a timestep twice.
    """
    exploding = isinstance(scheduler, VARIANCE_EXPLODING)
    # The copy is given x_0, or the epsilon that it implies. It neither clips nor splits off a variance.
    off = {"variance_type": None, "clip_sample": False}
    changes = {name: value for name, value in off.items() if name in scheduler.config}
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        changes["lower_order_final"] = True  # as the scheduler does by itself, with a warning
    prepared = changed_copy(scheduler, prediction_type="epsilon" if exploding else "sample", **changes)
    prepared.set_timesteps(num_inference_steps)  # on the CPU, where reading a timestep waits for nothing
    prepared.set_begin_index(0)
    prepared.is_scale_input_called = True  # the network is given x_t as it was trained on it
    if isinstance(scheduler, (EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        make_ancestral_levels_exact(prepared)
    levels = noise_levels(prepared)
    steps = torch.cat([levels[:-1:2], levels[-1:]]) if isinstance(scheduler, TWO_STAGE) else levels
    # DEIS and SASolver may end where they were, at the lowest level.
    if not ((steps[:-1].diff() < 0).all() and steps[-1] <= steps[-2]):
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: {type(scheduler).__name__} would visit a timestep twice; take"
            " fewer."
        )
    if isinstance(scheduler, TWO_STAGE) and steps[0] > max(HIGH_NOISE_LEVEL, 1000 * steps[1]) and steps[1] > 0:
        warnings.warn(
            f"{type(scheduler).__name__} goes from noise level {steps[0]:.0f} to {steps[1]:.2g} in one step, which burns colours."
            f" Take more steps than num_inference_steps={num_inference_steps}, or another scheduler.",
            stacklevel=2,
        )
    timesteps = prepared.timesteps.flip(0)
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps  # MPS has no float64
    # The solver's own noise levels: with Karras sigmas they lie between those of the training timesteps.
    sigmas = levels[:-1].double().flip(0)
    schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), timesteps)
    solver_class = VarianceExplodingSolver if exploding else EpsilonSolver
    solver = solver_class(scheduler, schedule, prepared, timesteps)
    if isinstance(scheduler, SASolverScheduler):
        solver.max_guidance_sigma = HIGH_NOISE_LEVEL  # its next steps extrapolate an error of the first
    return solver


def changed_copy(scheduler: SchedulerMixin, **changes) -> SchedulerMixin:
    """Returns a copy of a scheduler with another config, whose steps have not been set."""
    if not isinstance(scheduler, (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        return type(scheduler).from_config(scheduler.config, **changes)
    # Their constructors place as many steps as there are training timesteps, which takes longer than a run of few steps.
    copied = copy.deepcopy(scheduler)
    copied.register_to_config(**changes)
    return copied


def make_ancestral_levels_exact(
    prepared: EulerAncestralDiscreteScheduler | KDPM2AncestralDiscreteScheduler,
) -> None:
    """
    Computes the noise levels of an ancestral scheduler in float64. In float32 a step that removes nearly all noise may add
    more than it should end with.
    """
    prepared.sigmas = prepared.sigmas.double()
    if isinstance(prepared, KDPM2AncestralDiscreteScheduler):
        # A step goes down to sigma_next^2 / sigma before it adds noise; its geometric middle is then sigma_next. Of these
        # tables the scheduler reads the even places, where the next one holds sigma_next.
        sigma_next = prepared.sigmas.roll(-1)
        prepared.sigmas_interpol = sigma_next
        prepared.sigmas_down = sigma_next**2 / prepared.sigmas
        prepared.sigmas_up = (sigma_next**2 - prepared.sigmas_down**2).sqrt()
        prepared.timesteps[1::2] = prepared.timesteps[2::2].clone()


def noise_levels(scheduler: SchedulerMixin) -> torch.Tensor:
    """
    Returns sigma of each evaluation of a run, and of its end. Every other one of DPM-Solver-2 lies between two steps.
    """
    levels = scheduler.sigmas[: len(scheduler.timesteps) + 1].clone()
    if isinstance(scheduler, KDPM2DiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[1 : len(levels) - 1 : 2]
    if isinstance(scheduler, KDPM2AncestralDiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[: len(levels) - 2 : 2]
    return levels


def pndm_solver(scheduler: PNDMScheduler, schedule: NoiseSchedule) -> PNDMSolver:
    """
    Returns a run of pseudo linear multistep. Its first step is taken again once the network has been evaluated at its end.
    """
    prepared = respaced_copy(
        scheduler,
        schedule,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,  # or the last evaluation would lead nowhere
    )
    prepared.set_timesteps(len(schedule))
    places = prepared.timesteps.flip(0)
    evaluated = NoiseSchedule.from_alpha_bar(schedule.alpha_bar[places], schedule.timesteps[places])
    return PNDMSolver(scheduler, evaluated, prepared, places)


def respaced_copy(scheduler: SchedulerMixin, schedule: NoiseSchedule, **changes) -> SchedulerMixin:
    """
    Returns a scheduler for which the visited timesteps are all there are, numbered from 0. Its previous timestep is then
    always the one before in the list, which a stock scheduler gets wrong for most lists.
    """
    respaced = type(scheduler).from_config(
        scheduler.config, num_train_timesteps=len(schedule), trained_betas=schedule.beta.tolist(), **changes
    )
    respaced.alphas_cumprod = schedule.alpha_bar  # in float64, where its own is rounded
    return respaced


def visited_steps(schedule: NoiseSchedule, timesteps: list[int] | None) -> list[int]:
    """
    Returns the indices of a run in their order: down the schedule, or as a list of timesteps says.

    Raises:
        ValueError: If the timesteps skip one on the way down, or do not end with the least noisy.
    """
    if timesteps is None:
        return list(reversed(range(len(schedule))))
    index_of = {timestep: index for index, timestep in enumerate(schedule.timesteps.tolist())}
    visits = [index_of[timestep] for timestep in timesteps]
    for before, after in zip(visits, visits[1:]):
        if after < before - 1:
            skipped = schedule.timesteps[before - 1].item()
            raise ValueError(
                f"timesteps: from {schedule.timesteps[before]} down to {schedule.timesteps[after]} skips {skipped}, which is"
                " visited elsewhere. On the way down each step leads to the next lower of all that are visited."
            )
    if visits[-1] != 0:
        raise ValueError(f"timesteps={timesteps} must end with the least noisy of them.")
    return visits


def takes_respacing(scheduler: SchedulerMixin) -> bool:
    """Returns whether a scheduler takes a list of timesteps."""
    return isinstance(scheduler, (DDPMScheduler, DDIMScheduler, CMStochasticIterativeScheduler))


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError unless the scheduler is one that is known to sample right."""
    if not isinstance(scheduler, SUPPORTED_SCHEDULERS):
        names = ", ".join(supported.__name__ for supported in SUPPORTED_SCHEDULERS)
        raise ValueError(f"{type(scheduler).__name__} is not supported; these schedulers are: {names}.")
    config = scheduler.config
    check_types(SamplingConfig, config)
    betas_from_config(config)
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={config.prediction_type!r} is not one of {PREDICTION_TYPES}.")
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas=True is for flow matching; these are diffusion models.")
    if isinstance(scheduler, PNDMScheduler) and not config.skip_prk_steps:
        raise ValueError(
            "skip_prk_steps=False is not supported: the Runge-Kutta steps of PNDMScheduler mistake the noise level where their"
            " stride is odd. skip_prk_steps=True is."
        )
