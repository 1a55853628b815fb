"""Noise levels of the copies of diffusers schedulers that take the steps of a run."""

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    SchedulerMixin,
)

from diffusers_adm.checks import is_number
from diffusers_adm.diffusion import NoiseSchedule, timestep_at


# Schedulers that evaluate the network twice per step, except in the last step.
TWO_STAGE = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
_CLOSEST = 1e-4  # relative, because schedulers keep their noise levels in float32
_RANGE_ROUNDING = 1e-3  # relative, so that the ends of a range may be given with four digits


def check_sigmas(sigmas: list[float], sigma_range: tuple[float, float]) -> None:
    """
    Checks the noise levels that a caller lists.

    Args:
        sigmas: Noise levels in the order of the run.
        sigma_range: Lowest and highest noise level of the UNet.

    Raises:
        ValueError: If they are not a list of numbers in the range, or two of them are too close.
    """
    if not (isinstance(sigmas, (list, tuple)) and sigmas and all(is_number(sigma) and 0 < sigma for sigma in sigmas)):
        raise ValueError(
            f"`sigmas` must be a list of one or more positive numbers, without the end of the run, but got {sigmas}."
        )
    lowest, highest = sigma_range
    if not lowest * (1 - _RANGE_ROUNDING) <= min(sigmas) <= max(sigmas) <= highest * (1 + _RANGE_ROUNDING):
        raise ValueError(
            f"`sigmas` must be between {lowest:.4g} and {highest:.4g}, the noise levels of the UNet, but got {sigmas}."
        )
    ascending = sorted(set(sigmas))
    for sigma, next_sigma in zip(ascending, ascending[1:]):
        if next_sigma < sigma * (1 + _CLOSEST):
            raise ValueError(f"`sigmas` must differ by 0.01 % or more, but got {sigma!r} and {next_sigma!r}.")


def check_own_range(scheduler: SchedulerMixin, sigma_range: tuple[float, float]) -> None:
    """
    Checks the noise levels of a scheduler that has its own.

    Args:
        scheduler: Scheduler whose config has `sigma_min` and `sigma_max`.
        sigma_range: Lowest and highest noise level of the UNet.

    Raises:
        ValueError: If they lie outside of the range, or a consistency model has another lowest level.
    """
    lowest, highest = scheduler.config.sigma_min, scheduler.config.sigma_max
    inside = lowest >= sigma_range[0] * (1 - _RANGE_ROUNDING) and highest <= sigma_range[1] * (1 + _RANGE_ROUNDING)
    consistency = isinstance(scheduler, CMStochasticIterativeScheduler)
    if not inside or (consistency and lowest > sigma_range[0] * (1 + _RANGE_ROUNDING)):
        raise ValueError(
            f"The noise levels of {type(scheduler).__name__} must be those of the UNet, sigma_min={sigma_range[0]:.4g} and"
            f" sigma_max={sigma_range[1]:.4g}, but got {lowest:.4g} and {highest:.4g}."
        )


def listed_schedule(trained: NoiseSchedule, sigmas: list[float]) -> NoiseSchedule:
    """
    Returns the schedule of listed noise levels. Their timesteps are interpolated between the training timesteps.

    Args:
        trained: Noise schedule over all training timesteps.
        sigmas: Noise levels in the order of the run.

    Raises:
        ValueError: See `check_sigmas`.
    """
    check_sigmas(sigmas, (trained.sigma[0].item(), trained.sigma[-1].item()))
    levels = torch.tensor(sorted(set(sigmas)), dtype=torch.float64)
    return NoiseSchedule.from_alpha_bar(1 / (1 + levels**2), timestep_at(trained, levels).float())


def place_levels(prepared: SchedulerMixin, schedule: NoiseSchedule, trained: NoiseSchedule) -> None:
    """
    Moves the steps of a scheduler to other noise levels. `set_timesteps` of diffusers cannot do it for most schedulers, and rounds
    timesteps to integers. The end of the run stays.

    Args:
        prepared: Scheduler whose `set_timesteps` has been called with the number of steps. It is changed.
        schedule: Steps of the run, least noisy first.
        trained: Noise schedule over all training timesteps.
    """
    levels = schedule.sigma.flip(0).float()
    # diffusers rounds the betas, so the end of the run can be a little noisier than the lowest level of the schedule.
    levels = torch.cat([levels, torch.minimum(prepared.sigmas[-1:], levels[-1:])])
    timesteps = schedule.timesteps.flip(0)
    if prepared.timesteps.is_floating_point():
        timesteps = timesteps.float()
    if not isinstance(prepared, TWO_STAGE):
        prepared.sigmas, prepared.timesteps = levels, timesteps
        return
    second = timesteps[1:]  # Heun's second evaluation is at the end of the step
    if isinstance(prepared, KDPM2DiscreteScheduler):
        middles = (levels * levels.roll(1)).sqrt()
        prepared.sigmas_interpol = _doubled(middles)
        second = timestep_at(trained, middles[1:-1])
    prepared.sigmas = _doubled(levels)
    prepared.timesteps = torch.cat([timesteps[:1], torch.stack([second, timesteps[1:]], dim=1).flatten()])


def _doubled(table: torch.Tensor) -> torch.Tensor:
    """Returns a table with an entry for each evaluation of a two-stage scheduler."""
    return torch.cat([table[:1], table[1:].repeat_interleave(2), table[-1:]])


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
