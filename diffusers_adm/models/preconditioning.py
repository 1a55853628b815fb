"""Preconditioning of a network that is given the noise level (Karras et al. 2022, arXiv 2206.00364, Table 1)."""

from dataclasses import dataclass, field

import torch

from diffusers_adm.diffusion import NoiseSchedule, timestep_at


PRECONDITIONINGS = ("edm", "consistency")


def training_schedule(num_train_timesteps: int, beta_schedule: str) -> NoiseSchedule:
    """
    Returns the noise schedule that a network was trained with, from entries of its config.

    Args:
        num_train_timesteps: Number of training timesteps.
        beta_schedule: Name of the schedule in diffusers. The betas of `"linear"` go from 0.1 to 20, divided by the number of
            timesteps.
    """
    start, end = 0.1 / num_train_timesteps, 20 / num_train_timesteps
    config = {"num_train_timesteps": num_train_timesteps, "beta_schedule": beta_schedule}
    return NoiseSchedule.from_config({**config, "beta_start": start, "beta_end": end})


@dataclass(frozen=True)
class Preconditioning:
    """
    Coefficients of the denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise). F is the network. D predicts x_0 from
    x = x_0 + sigma epsilon.

    Args:
        kind: Kind of preconditioning: `"edm"` (Karras et al. 2022, Table 1), or `"consistency"`, for which D(x; sigma_min) = x (Song
            et al. 2023, arXiv 2303.01469, appendix C).
        sigma_data: Standard deviation of the clean images.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        beta_schedule: Noise schedule of diffusers whose timesteps the network is given. `None` if it is given the logarithm of the
            noise level.
        num_train_timesteps: Number of timesteps of `beta_schedule`.

    Attributes:
        schedule: Tables of `beta_schedule`, or `None`.

    Raises:
        ValueError: If the kind is unknown, a number is not positive, or `sigma_min` is not below `sigma_max`.
    """

    kind: str
    sigma_data: float
    sigma_min: float
    sigma_max: float
    beta_schedule: str | None = None
    num_train_timesteps: int = 1000
    schedule: NoiseSchedule | None = field(init=False, default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.kind not in PRECONDITIONINGS:
            raise ValueError(f"`preconditioning` must be one of {PRECONDITIONINGS}, but got {self.kind!r}.")
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"`sigma_data` must be positive and finite, but got {self.sigma_data}.")
        if not 0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ValueError(
                "`sigma_min` and `sigma_max` must be positive and finite, and `sigma_min` must be the smaller one, but got"
                f" {self.sigma_min} and {self.sigma_max}."
            )
        if self.beta_schedule is not None:
            with torch.device("cpu"):  # a model whose weights are on the meta device needs the tables too
                schedule = training_schedule(self.num_train_timesteps, self.beta_schedule)
            object.__setattr__(self, "schedule", schedule)

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the scale of the network's input, of the shape of sigma."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the noise level in the form in which the network is given it, of the shape of sigma. It is finite also at 0."""
        if self.schedule is not None:
            return timestep_at(self.schedule, sigma)
        return sigma.clamp(min=torch.finfo(sigma.dtype).tiny).log() / 4

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the coefficient of x in the predicted x_0, of the shape of sigma."""
        return self.sigma_data**2 / (self._above_lowest(sigma) ** 2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the coefficient of the network's output in the predicted x_0, of the shape of sigma."""
        return self._above_lowest(sigma) * self.sigma_data * self.c_in(sigma)

    def _above_lowest(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma - self.sigma_min if self.kind == "consistency" else sigma
