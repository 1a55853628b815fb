"""Images with which a run begins: noise, images of the caller with noise, or noised images of the caller."""

import math
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.checks import is_number
from diffusers_adm.diffusion import add_noise
from diffusers_adm.solvers import Solver
from diffusers_adm.solvers.visits import ROUNDING


@dataclass(frozen=True)
class Beginning:
    """
    Images with which a run begins, see [`ClassifierGuidedPipeline.__call__`].

    Args:
        latents: Noise x_T, or noised images x_t at the timestep `start`. `None` means that noise is drawn.
        image: Clean images in [-1, 1] that are noised, `(batch, channels, height, width)`.
        start: Timestep at which the run begins. `None` means the first one.
        strength: Fraction of the steps that are taken, in (0, 1].

    Raises:
        ValueError: If arguments contradict each other, or `strength` is out of its range.
    """

    latents: torch.Tensor | None = None
    image: torch.Tensor | None = None
    start: float | torch.Tensor | None = None
    strength: float | None = None

    def __post_init__(self):
        if self.image is not None and self.latents is not None:
            raise ValueError("`image` and `latents` must not be given together. Pass one of them.")
        if self.start is not None and self.strength is not None:
            raise ValueError("`start` and `strength` must not be given together. Pass one of them.")
        if self.image is not None and self.start is None and self.strength is None:
            raise ValueError("`image` requires a `strength` in (0, 1], or a `start`, but got neither.")
        if self.start is not None and self.image is None and self.latents is None:
            raise ValueError(
                "`start` requires images to begin with, which are `latents` or the `image` of a ClassifierGuidedPipeline, but got none."
            )
        if self.strength is not None and self.image is None:
            raise ValueError("`strength` requires an `image`. With `latents`, pass `start`.")
        if self.strength is not None and not (is_number(self.strength) and 0 < self.strength <= 1):
            raise ValueError(f"`strength` must be a number in (0, 1], but got {self.strength!r}.")

    @property
    def is_noised(self) -> bool:
        """Whether the run begins with noised images instead of pure noise."""
        return self.start is not None or self.strength not in (None, 1)

    def skip(self, pipeline: DiffusionPipeline, solver: Solver) -> None:
        """
        Leaves out the steps of a run before its beginning.

        Args:
            pipeline: Pipeline of the run.
            solver: Solver of the run.

        Raises:
            ValueError: If no step is left, or `start` is not a timestep.
        """
        if self.start is not None:
            solver.begin_at(step_at(pipeline, solver, "start", self.start))
        elif self.is_noised:
            steps = list(solver.entries)
            taken = int(len(steps) * self.strength)  # as in the pipelines of diffusers
            if not taken:
                raise ValueError(
                    f"`strength` must be at least {1 / len(steps):.3g}, so that one of {len(steps)} steps is taken, but got"
                    f" {self.strength}."
                )
            solver.begin_at(steps[-taken])

    def per_particle(self, particles: int) -> "Beginning":
        """Returns the beginning of a run in which each image is repeated for each particle."""
        return replace(self, image=None if self.image is None else self.image.repeat_interleave(particles, dim=0))

    def first_images(
        self,
        solver: Solver,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> torch.Tensor:
        """
        Returns the images of the first step, `(batch, channels, height, width)`, float32.

        Args:
            solver: Solver of the run.
            shape: Shape of the images.
            generator: Generator of the noise, one for all images or one per image.
            device: Device of the images.

        Raises:
            ValueError: If given images have another shape, or are not finite.
        """
        for name, images in (("latents", self.latents), ("image", self.image)):
            if images is not None and tuple(images.shape) != shape:
                raise ValueError(f"`{name}` must have the shape {shape}, but got {tuple(images.shape)}.")
        if self.latents is None:
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            x = self.latents.to(device, torch.float32, copy=True)  # callbacks may change x_t in place
            if not x.isfinite().all():
                raise ValueError("`latents` must be finite in float32, but some values are NaN or infinite.")
        if not self.is_noised:
            return solver.begin(x, generator)
        return x if self.image is None else add_noise(solver.schedule, self.image.to(device), solver.visits[0], x)


def step_at(pipeline: DiffusionPipeline, solver: Solver, name: str, timestep: float | torch.Tensor) -> int:
    """
    Returns the number of the first step of a run whose timestep is at most a given one.

    Args:
        pipeline: Pipeline of the run.
        solver: Solver of the run.
        name: Name of the argument, for error messages.
        timestep: Training timestep, or noise level for a UNet with preconditioning.

    Raises:
        ValueError: If the timestep does not exist, or the timesteps of all steps are higher.
    """
    takes_sigma = pipeline.unet.config.get("preconditioning") is not None
    highest = math.inf if takes_sigma else pipeline.scheduler.config.num_train_timesteps - 1
    is_fraction = isinstance(timestep, float) and 0 < timestep < 1 and not takes_sigma
    if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
        timestep = timestep.item()  # that of a `SamplingStep`, which may be between 0 and 1
    if not (is_number(timestep) and 0 <= timestep <= highest):
        allowed = "a noise level of at least 0" if takes_sigma else f"a training timestep in [0, {highest}]"
        raise ValueError(f"`{name}` must be {allowed}, but got {timestep!r}.")
    if is_fraction:
        advice = " For a fraction of the steps, pass `strength`." if name == "start" else ""
        raise ValueError(
            f"`{name}` must be a training timestep in [0, {highest}], but got the fraction {timestep!r}.{advice}"
        )
    for step, visited in solver.entries.items():
        if visited <= timestep * (1 + ROUNDING):
            return step
    raise ValueError(f"`{name}` must be at least {visited:g}, the lowest timestep of the run, but got {timestep:g}.")
