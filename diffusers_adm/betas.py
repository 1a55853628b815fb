"""Betas of a scheduler's config. A beta is the variance of the noise that a training timestep adds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffusers_adm.checks import check_types


def checked_betas(beta: torch.Tensor | list[float]) -> torch.Tensor:
    """
    Returns betas in float64, `(num_train_timesteps,)`.

    Raises:
        ValueError: If the betas are not a list of numbers in (0, 1).
    """
    try:
        numbers = torch.as_tensor(beta)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Betas must be numbers, but got {beta!r}.") from error
    if numbers.is_complex() or numbers.ndim != 1 or not len(numbers):
        raise ValueError(
            f"Betas must be real numbers, one per timestep, but got {numbers.dtype}, {tuple(numbers.shape)}."
        )
    table = torch.as_tensor(beta, dtype=torch.float64)  # from the given numbers, because float32 would round them
    wrong = table[~((0 < table) & (table < 1))]
    if len(wrong):
        raise ValueError(
            f"Betas must be in (0, 1), but {len(wrong)} of {len(table)} are not, such as {wrong[0].item():g}."
        )
    return table


@dataclass
class NoiseConfig:
    """Entries of a scheduler's config that describe its noise, with the defaults of diffusers."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02


def betas_from_config(config: dict) -> torch.Tensor:
    """
    Returns the betas that the config of a diffusers scheduler describes, `(num_train_timesteps,)`, float64, each in (0, 1).

    Args:
        config: Config of a scheduler.

    Raises:
        ValueError: If `beta_schedule` is unknown, the config rescales betas to a zero terminal SNR, an entry is missing or has a
            wrong type, or a beta is not in (0, 1).
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"A scheduler's config must be a dict, but got {type(config).__name__}.")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr=True is not supported, because epsilon does not determine x_0 at zero SNR."
        )
    check_types(NoiseConfig, config)
    if config.get("trained_betas") is not None:
        return checked_betas(config["trained_betas"])
    missing = sorted(vars(NoiseConfig()).keys() - config.keys())
    if missing:
        raise ValueError(f"A scheduler's config must describe its noise, but it lacks the entries {missing}.")
    steps, schedule = config["num_train_timesteps"], config["beta_schedule"]
    start, end = config["beta_start"], config["beta_end"]
    if steps < 1:
        raise ValueError(f"`num_train_timesteps` must be at least 1, but got {steps}.")
    if schedule != "squaredcos_cap_v2" and not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"`beta_start` and `beta_end` must be in (0, 1), but got {start} and {end}.")
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":  # the paper's "cosine" [Nichol & Dhariwal 2021, eq. 17]
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(
        f"`beta_schedule` must be one of 'linear', 'scaled_linear' and 'squaredcos_cap_v2', but got {schedule!r}."
    )
