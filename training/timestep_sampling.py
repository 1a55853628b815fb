"""Distributions of the timesteps that training draws, and the weights of their losses.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3.
"""

import torch
from torch import nn


class UniformSampler(nn.Module):
    """
    Draws all timesteps with the same probability.

    Args:
        num_timesteps: Number of timesteps to draw from.
    """

    needs_losses = False

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.num_timesteps = num_timesteps

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a timestep per image.

        Returns:
            The timesteps, `(batch_size,)`, and the weights of the images' losses, `(batch_size,)`.
        """
        timestep = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return timestep, torch.ones(batch_size, device=device)


class LossSecondMomentSampler(nn.Module):
    """
    Draws each timestep in proportion to the root of the mean square of its latest losses, and weights losses so that
    their expectation is the same as under uniform drawing [Nichol & Dhariwal 2021, eq. 18]. It makes the variational
    bound, whose terms differ by orders of magnitude, less noisy. The hybrid loss does not need it.

    It draws uniformly until each timestep has a full history. All processes must give it the same losses, because their
    weights drift apart otherwise. Its state is in buffers, which `state_dict` holds.

    Args:
        num_timesteps: Number of timesteps to draw from.
        history_size: Number of losses per timestep that count.
        uniform_probability: Share of the draws that stays uniform, so that no timestep is forgotten.
    """

    needs_losses = True

    def __init__(self, num_timesteps: int, history_size: int = 10, uniform_probability: float = 0.001):
        super().__init__()
        self.uniform_probability = uniform_probability
        self.register_buffer("history", torch.zeros(num_timesteps, history_size))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self) -> torch.Tensor:
        """Returns the probability of each timestep, `(num_timesteps,)`."""
        num_timesteps, history_size = self.history.shape
        uniform = torch.full_like(self.history[:, 0], 1 / num_timesteps)
        moments = self.history.square().mean(dim=1).sqrt()
        by_moment = moments / moments.sum() * (1 - self.uniform_probability) + uniform * self.uniform_probability
        # Chosen on the device: asking whether the histories are full would wait for it at every step.
        return torch.where((self.counts >= history_size).all(), by_moment, uniform)

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a timestep per image, see [`UniformSampler.sample`]."""
        probabilities = self.probabilities().to(device)
        timestep = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        weight = 1 / (len(probabilities) * probabilities[timestep])
        return timestep, weight

    @torch.no_grad()
    def update(self, timestep: torch.Tensor, loss: torch.Tensor) -> None:
        """
        Adds losses to the history, each in the place of the oldest one of its timestep.

        Args:
            timestep: Timestep of each image of all processes, `(batch,)`.
            loss: Loss of each image without the weight, `(batch,)`. Losses that are not finite, which half precision may
                give, are left out.
        """
        finite = loss.isfinite()
        timestep, loss = timestep[finite], loss[finite]
        timestep, order = timestep.to(self.counts.device).sort(stable=True)
        loss = loss.to(self.history.device, self.history.dtype)[order]
        # A timestep that was drawn several times takes as many places, one after the other.
        first = torch.searchsorted(timestep, timestep)
        occurrence = torch.arange(len(timestep), device=timestep.device) - first
        drawn = torch.bincount(timestep, minlength=len(self.counts))
        history_size = self.history.shape[1]
        latest = occurrence >= drawn[timestep] - history_size  # more than fit: the last ones
        place = (self.counts[timestep] + occurrence) % history_size
        self.history[timestep[latest], place[latest]] = loss[latest]
        self.counts += drawn


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
