"""Preparation of diffusers schedulers for one run that samples as the original code does."""

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
from diffusers_adm.choices import PREDICTION_TYPES
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.respacing import evenly_spaced_timesteps, respaced_timesteps, trailing_timesteps
from diffusers_adm.solvers.algorithms import (
    HIGH_NOISE_LEVEL,
    DDPMSolver,
    EpsilonSolver,
    PNDMSolver,
    VarianceExplodingSolver,
)


# Schedulers that evaluate the network twice per step, except in the last step.
TWO_STAGE = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
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
) -> DDPMSolver | EpsilonSolver:
    """
    Prepares a scheduler for one run.

    Args:
        scheduler: One of `SUPPORTED_SCHEDULERS`. It is not changed.
        num_inference_steps: Number of steps, in [1, num_train_timesteps]. DDPM and DDIM place them as the original code does if
            `timestep_spacing` is `"leading"` or `"linspace"`. If it is `"trailing"`, the steps end at the last timestep.
        timestep_respacing: Respacing string of the original code, for DDPM and DDIM. It overrides `num_inference_steps`.
        eta: Noise of DDIM, in [0, 1]. 0 is deterministic, and 1 is as noisy as DDPM.
        timesteps: Training timesteps to visit, in the order of the run, for DDPM and DDIM. They override `num_inference_steps` and
            `timestep_respacing`.

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
    """Raises a `ValueError` if the scheduler cannot take the requested steps."""
    num_train_timesteps, name = scheduler.config.num_train_timesteps, type(scheduler).__name__
    if not (isinstance(eta, Real) and 0 <= eta <= 1):
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
    if timesteps is None and timestep_respacing is None:
        if not (is_integer(num_inference_steps) and 1 <= num_inference_steps <= num_train_timesteps):
            raise ValueError(
                f"`num_inference_steps` must be an integer in [1, {num_train_timesteps}], the model's timesteps, but got"
                f" num_inference_steps={num_inference_steps}."
            )
    elif not takes_respacing(scheduler):
        given = f"timesteps={timesteps}" if timesteps is not None else f"timestep_respacing={timestep_respacing!r}"
        raise ValueError(
            f"{given} requires DDPMScheduler or DDIMScheduler, but the scheduler is {name}. Pass `num_inference_steps` instead."
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


def sigma_solver(scheduler: SchedulerMixin, num_inference_steps: int) -> EpsilonSolver:
    """
    Returns a run of a scheduler that chooses its noise levels (`sigmas`) and timesteps itself. One evaluation of the network counts
    as one step of the run.

    Raises:
        ValueError: If the run would visit a timestep twice.
    """
    exploding = isinstance(scheduler, VARIANCE_EXPLODING)
    # The copy is given the guided x_0, or the epsilon that follows from it. It must neither clip x_0 nor expect a variance.
    off = {"variance_type": None, "clip_sample": False}
    changes = {name: value for name, value in off.items() if name in scheduler.config}
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        changes["lower_order_final"] = True  # as the scheduler does by itself, with a warning
    prepared = changed_copy(scheduler, prediction_type="epsilon" if exploding else "sample", **changes)
    prepared.set_timesteps(num_inference_steps)  # on the CPU, because reading a timestep from a GPU would wait for it
    prepared.set_begin_index(0)
    prepared.is_scale_input_called = True  # x_t already has the scale that the network was trained on
    if isinstance(scheduler, (EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        make_ancestral_levels_exact(prepared)
    levels = noise_levels(prepared)
    steps = torch.cat([levels[:-1:2], levels[-1:]]) if isinstance(scheduler, TWO_STAGE) else levels
    # DEIS and SA-Solver may visit the lowest noise level twice, at the end.
    if not ((steps[:-1].diff() < 0).all() and steps[-1] <= steps[-2]):
        raise ValueError(
            f"`num_inference_steps` must be smaller, because {type(scheduler).__name__} would visit a timestep twice, but got"
            f" {num_inference_steps}."
        )
    if isinstance(scheduler, TWO_STAGE) and steps[0] > max(HIGH_NOISE_LEVEL, 1000 * steps[1]) and steps[1] > 0:
        warnings.warn(
            f"{type(scheduler).__name__} goes from noise level {steps[0]:.0f} to {steps[1]:.2g} in one step, which oversaturates"
            f" colours. Pass more steps than num_inference_steps={num_inference_steps}, or use another scheduler.",
            stacklevel=2,
        )
    timesteps = prepared.timesteps.flip(0)
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps  # MPS has no float64
    # The scheduler's own noise levels, because Karras sigmas lie between those of the training timesteps.
    sigmas = levels[:-1].double().flip(0)
    schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), timesteps)
    solver_class = VarianceExplodingSolver if exploding else EpsilonSolver
    evaluations_per_step = 2 if isinstance(scheduler, TWO_STAGE) else 1
    solver = solver_class(scheduler, schedule, prepared, timesteps, evaluations_per_step=evaluations_per_step)
    if isinstance(scheduler, SASolverScheduler):
        solver.max_guidance_sigma = HIGH_NOISE_LEVEL  # later steps extrapolate an error of the first one
    return solver


def changed_copy(scheduler: SchedulerMixin, **changes) -> SchedulerMixin:
    """Returns a copy of a scheduler with changes to its config. The steps of the copy are not set."""
    if not isinstance(scheduler, (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        return type(scheduler).from_config(scheduler.config, **changes)
    # These constructors set one step per training timestep, which takes longer than a short run. A deep copy avoids them.
    copied = copy.deepcopy(scheduler)
    copied.register_to_config(**changes)
    return copied


def make_ancestral_levels_exact(
    prepared: EulerAncestralDiscreteScheduler | KDPM2AncestralDiscreteScheduler,
) -> None:
    """
    Computes the noise levels of an ancestral scheduler in float64. In float32, rounding can make a step that removes nearly all
    noise add more noise than its target has.
    """
    prepared.sigmas = prepared.sigmas.double()
    if isinstance(prepared, KDPM2AncestralDiscreteScheduler):
        # A step goes down to sigma_next^2 / sigma before it adds noise, so its geometric middle is sigma_next. The scheduler reads
        # only the even entries of these tables. At them, the next entry of `sigmas` is sigma_next.
        sigma_next = prepared.sigmas.roll(-1)
        prepared.sigmas_interpol = sigma_next
        prepared.sigmas_down = sigma_next**2 / prepared.sigmas
        prepared.sigmas_up = (sigma_next**2 - prepared.sigmas_down**2).sqrt()
        prepared.timesteps[1::2] = prepared.timesteps[2::2].clone()


def noise_levels(scheduler: SchedulerMixin) -> torch.Tensor:
    """
    Returns the noise level of each evaluation of a run, and the noise level at its end. Every second evaluation of DPM-Solver-2 lies
    between two steps.
    """
    levels = scheduler.sigmas[: len(scheduler.timesteps) + 1].clone()
    if isinstance(scheduler, KDPM2DiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[1 : len(levels) - 1 : 2]
    if isinstance(scheduler, KDPM2AncestralDiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[: len(levels) - 2 : 2]
    return levels


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
        scheduler.config, num_train_timesteps=len(schedule), trained_betas=schedule.beta.tolist(), **changes
    )
    respaced.alphas_cumprod = schedule.alpha_bar  # in float64, because the scheduler's own table is rounded
    return respaced


def visited_steps(schedule: NoiseSchedule, timesteps: list[int] | None) -> list[int]:
    """
    Returns the indices into a schedule in the order of a run.

    Args:
        schedule: Timesteps of the run, least noisy first.
        timesteps: Training timesteps in the order of the run. `None` means from the noisiest step down.

    Raises:
        ValueError: If the timesteps skip a visited one on the way down, or do not end with the least noisy one.
    """
    if timesteps is None:
        return list(reversed(range(len(schedule))))
    index_of = {timestep: index for index, timestep in enumerate(schedule.timesteps.tolist())}
    visits = [index_of[timestep] for timestep in timesteps]
    for before, after in zip(visits, visits[1:]):
        if after < before - 1:
            skipped = schedule.timesteps[before - 1].item()
            raise ValueError(
                "`timesteps` must not skip a timestep on the way down that they visit elsewhere, but the step from"
                f" {schedule.timesteps[before]} to {schedule.timesteps[after]} skips {skipped}."
            )
    if visits[-1] != 0:
        raise ValueError(
            f"`timesteps` must end with the least noisy one, {schedule.timesteps[0]}, but got {timesteps}."
        )
    return visits


def takes_respacing(scheduler: SchedulerMixin) -> bool:
    """Returns whether a scheduler takes a list of timesteps."""
    return isinstance(scheduler, (DDPMScheduler, DDIMScheduler, CMStochasticIterativeScheduler))


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a `ValueError` if the scheduler or an option of its config is not supported."""
    if not isinstance(scheduler, SUPPORTED_SCHEDULERS):
        names = ", ".join(supported.__name__ for supported in SUPPORTED_SCHEDULERS)
        raise ValueError(f"{type(scheduler).__name__} is not supported. Use one of {names}.")
    config = scheduler.config
    check_types(SamplingConfig, config)
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
