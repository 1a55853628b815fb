"""Twisted sequential Monte Carlo (Wu et al. 2023, arXiv 2306.17775): samples of p(x_0 | y) that are exact for many particles.

Each image has K particles. At each step, the weight of a particle is multiplied by psi_t(x_t) = p(y | x_t)^s and divided by psi of the
step before. A second factor corrects the weight, because a guided step has proposed the particle in place of the unguided step. If few
particles of an image carry most of the weight, all its particles are resampled: they are drawn anew from the weighted ones.
"""

import torch


class Particles:
    """
    Weights of the particles of one run. Particle k of image i is row i * K + k of a batch.

    Args:
        num_images: Number of images.
        num_particles: Number K of particles of each image.
        generator: Generator that chooses particles, one for all images or one per image.
        device: Device of the particles.

    Attributes:
        log_weights: Logarithm of each particle's weight, up to a constant per image, `(images, particles)`.
    """

    def __init__(
        self,
        num_images: int,
        num_particles: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ):
        self.num_images = num_images
        self.num_particles = num_particles
        self.generator = generator
        self.log_weights = torch.zeros(num_images, num_particles, device=device)
        self.places = torch.arange(num_particles, device=device)  # (particles,)
        self.unweighted = torch.zeros(
            num_images * num_particles, device=device
        )  # what the next weights are divided by

    @property
    def effective_number(self) -> torch.Tensor:
        """Effective number of particles of each image, `(images,)`: 1 / sum of w^2. It is K if all weights are equal."""
        return 1 / self.log_weights.softmax(dim=1).square().sum(dim=1)

    def select(self, log_psi: torch.Tensor) -> torch.Tensor:
        """
        Weights the particles at a step, and resamples the particles of each image whose effective number has fallen below K / 2
        (systematic resampling). Returns the rows of the chosen particles, `(batch,)`.

        Args:
            log_psi: Logarithm of psi_t(x_t), `(batch,)`.
        """
        self.log_weights = self.log_weights + (log_psi - self.unweighted).view_as(self.log_weights)
        few = (self.effective_number < self.num_particles / 2)[:, None]  # (images, 1)
        chosen = torch.where(few, self._systematic(self.num_particles), self.places)  # (images, particles)
        self.log_weights = self.log_weights.masked_fill(few, 0.0)
        rows = self._rows(chosen)
        self.unweighted = log_psi[rows]
        return rows

    def propose(self, log_density_ratio: torch.Tensor) -> None:
        """
        Corrects the next weights for the guidance of a step.

        Args:
            log_density_ratio: Log-density of the particles under the unguided step, minus that under the guided step, `(batch,)`.
        """
        self.unweighted = self.unweighted - log_density_ratio

    def draw(self) -> torch.Tensor:
        """Draws one particle of each image by its weight, and returns their rows, `(images,)`."""
        return self._rows(self._systematic(1))

    def _systematic(self, count: int) -> torch.Tensor:
        """Draws particles of each image at evenly spaced places of the cumulative weights, `(images, count)`."""
        start = self._uniform() + torch.arange(count, device=self.places.device)  # (images, count)
        sums = self.log_weights.softmax(dim=1).cumsum(dim=1)  # (images, particles)
        return torch.searchsorted(sums, start / count).clamp(max=self.num_particles - 1)

    def _rows(self, chosen: torch.Tensor) -> torch.Tensor:
        first = torch.arange(self.num_images, device=chosen.device)[:, None] * self.num_particles  # (images, 1)
        return (first + chosen).flatten()

    def _uniform(self) -> torch.Tensor:
        """Draws a number in [0, 1) for each image, `(images, 1)`."""
        if isinstance(self.generator, list):
            numbers = [torch.rand(1, generator=own, device=own.device).cpu() for own in self.generator]
            return torch.stack(numbers).to(self.places.device)
        device = "cpu" if self.generator is None else self.generator.device
        return torch.rand(self.num_images, 1, generator=self.generator, device=device).to(self.places.device)
