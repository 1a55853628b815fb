"""Distributions of the timesteps that training draws, and the weights of their losses.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3.
"""

import torch
from torch import nn

from diffusers_adm.choices import TIMESTEP_SAMPLERS


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
            Timesteps, `(batch_size,)`, and weights of the losses of the images, `(batch_size,)`.
        """
        timestep = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return timestep, torch.ones(batch_size, device=device)


class LossSecondMomentSampler(nn.Module):
    """
    Draws each timestep in proportion to the root mean square of its latest losses [Nichol & Dhariwal 2021, eq. 18].

    Weights of the losses keep their expectation the same as with uniform sampling. This makes the variational bound less noisy,
    because its terms differ by orders of magnitude. The hybrid loss does not need it.

    Timesteps are drawn uniformly until each has a full history. All processes must pass the same losses to `update`, because
    their weights would drift apart otherwise. The state is in buffers, which `state_dict` contains.

    Args:
        num_timesteps: Number of timesteps to draw from.
        history_size: Number of latest losses that are kept per timestep.
        uniform_probability: Share of the draws that stays uniform, so that every timestep is still drawn.
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
        # `where` chooses on the device, because an `if` would wait for the device at every step.
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
        Adds losses to the history. Each replaces the oldest loss of its timestep.

        Args:
            timestep: Timesteps of the images of all processes, `(batch,)`.
            loss: Unweighted losses of the images, `(batch,)`. Losses that are not finite are left out; half precision can
                produce them.
        """
        num_timesteps, history_size = self.history.shape
        # Losses that are left out go to a spare row, because a boolean mask would wait for the device at every step.
        history, counts = nn.functional.pad(self.history, (0, 0, 0, 1)), nn.functional.pad(self.counts, (0, 1))
        timestep = torch.where(loss.isfinite(), timestep, num_timesteps).to(counts.device)
        timestep, order = timestep.sort(stable=True)
        loss = loss.to(history.device, history.dtype)[order]
        # A timestep that was drawn several times takes that many consecutive places.
        first = torch.searchsorted(timestep, timestep)
        occurrence = torch.arange(len(timestep), device=timestep.device) - first
        drawn = torch.zeros_like(counts).index_add(0, timestep, torch.ones_like(timestep))
        latest = occurrence >= drawn[timestep] - history_size  # if more were drawn than fit, the last ones are kept
        place = (counts[timestep] + occurrence) % history_size
        history[torch.where(latest, timestep, num_timesteps), place] = loss
        self.history.copy_(history[:-1])
        self.counts += drawn[:-1]


SAMPLERS = dict(zip(TIMESTEP_SAMPLERS, (UniformSampler, LossSecondMomentSampler)))
