"""Which timesteps training draws, and how much each counts.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3.
"""

import torch
from torch import nn


class UniformSampler(nn.Module):
    """
    Draws all timesteps alike.

    Args:
        num_timesteps: Those to draw from.
    """

    needs_losses = False

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.num_timesteps = num_timesteps

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws a timestep for each image.

        Returns:
            The timesteps, `(batch_size,)`, and the weight of each image's loss, `(batch_size,)`.
        """
        timestep = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return timestep, torch.ones(batch_size, device=device)


class LossSecondMomentSampler(nn.Module):
    """
    Draws each timestep in proportion to the root of the mean square of its latest losses, and weights losses so that
    their expectation stays what it is under uniform drawing [Nichol & Dhariwal 2021, eq. 18]. It makes the variational
    bound, whose terms differ by orders of magnitude, less noisy; the hybrid loss has no need of it.

    Until each timestep has a full history it draws uniformly. All processes must give it the same losses, or their
    weights drift apart. Its state lies in buffers: `state_dict` holds all of it.

    Args:
        num_timesteps: Those to draw from.
        history_size: How many losses of each timestep count.
        uniform_probability: Share of the draws that stays uniform, so that no timestep is forgotten.
    """

    needs_losses = True

    def __init__(self, num_timesteps: int, history_size: int = 10, uniform_probability: float = 0.001):
        super().__init__()
        self.uniform_probability = uniform_probability
        self.register_buffer("history", torch.zeros(num_timesteps, history_size))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self) -> torch.Tensor:
        """Of drawing each timestep: `(num_timesteps,)`."""
        num_timesteps, history_size = self.history.shape
        uniform = torch.full_like(self.history[:, 0], 1 / num_timesteps)
        moments = self.history.square().mean(dim=1).sqrt()
        by_moment = moments / moments.sum() * (1 - self.uniform_probability) + uniform * self.uniform_probability
        # Chosen on the device: asking whether the histories are full would wait for it at every step.
        return torch.where((self.counts >= history_size).all(), by_moment, uniform)

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a timestep for each image, and gives the weight of its loss; as [`UniformSampler.sample`]."""
        probabilities = self.probabilities().to(device)
        timestep = torch.multinomial(probabilities, batch_size, replacement=True, generator=generator)
        weight = 1 / (len(probabilities) * probabilities[timestep])
        return timestep, weight

    @torch.no_grad()
    def update(self, timestep: torch.Tensor, loss: torch.Tensor) -> None:
        """
        Takes in losses, each in the place of the oldest of its timestep.

        Args:
            timestep: Of each image of all processes, `(batch,)`.
            loss: Its loss without the weight, `(batch,)`; those that are not finite, as half precision may give, are left
                out.
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
