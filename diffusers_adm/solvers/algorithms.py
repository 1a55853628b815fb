"""Solvers that apply the classifier gradient in each step (Dhariwal & Nichol 2021, arXiv 2105.05233, Algorithms 1 and 2).

A solver is one run of a diffusers scheduler. It works on a local copy and never changes the scheduler.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm.diffusion import (
    NoiseSchedule,
    epsilon_from_x_0,
    fixed_log_variance,
    learned_log_variance,
    posterior_mean,
    read_table,
    renoise,
    shift_epsilon,
    shift_mean,
    spherical_noise,
    split_learned_variance,
    x_0_from_epsilon,
    x_0_from_prediction,
)
from diffusers_adm.solvers.clipping import clip_range, thresholds


HIGH_NOISE_LEVEL = 200.0  # above the last timestep of the linear schedule, 157
VARIANCE_TYPES = ("learned_range", "fixed_large", "fixed_small", "fixed_small_log")


@dataclass(frozen=True)
class Denoised:
    """
    Predicted x_0 at one step, and the log-variance of the step.

    Args:
        x_0: Predicted x_0, `(batch, channels, height, width)`, float32.
        log_variance: Log-variance of p(x_{t-1} | x_t), a number or a tensor of the shape of `x_0`. `None` if the solver does not
            need it.
    """

    x_0: torch.Tensor
    log_variance: torch.Tensor | float | None = None

    def detach(self) -> "Denoised":
        """Returns the same values, detached from the graph of a gradient through the UNet."""
        if not self.x_0.requires_grad and not getattr(self.log_variance, "requires_grad", False):
            return self
        is_tensor = isinstance(self.log_variance, torch.Tensor)
        return Denoised(self.x_0.detach(), self.log_variance.detach() if is_tensor else self.log_variance)

    def rows(self, rows: torch.Tensor) -> "Denoised":
        """Returns the predictions of some rows of the batch."""
        is_tensor = isinstance(self.log_variance, torch.Tensor)
        return Denoised(self.x_0[rows], self.log_variance[rows] if is_tensor else self.log_variance)


class Solver:
    """
    One run of a scheduler.

    Args:
        scheduler: Scheduler that the run belongs to.
        schedule: Timesteps of the run, least noisy first.
        visits: Indices into the schedule, in the order of the run. Default: from the noisiest step down.

    Attributes:
        sigmas: Noise level of each step of the run, in the order of `visits`.
        x_0_shifts: Factor sigma * sqrt(1 - alpha_bar) at each step of the run. A gradient that shifts epsilon moves the predicted
            x_0 by this factor times the gradient.
        max_x_0_shift: Default limit of the shift of the predicted x_0, a root mean square per image. `None` means no limit.
        max_guidance_sigma: Highest noise level at which guidance acts by default.
        shifts_epsilon: Whether guidance shifts epsilon (Algorithm 2) instead of the mean of a step (Algorithm 1).
        spherical: Rate at which the gradient's direction is mixed with the noise of a step, instead of a shift. `None` means a shift.
    """

    shifts_epsilon = True
    max_x_0_shift: float | None = None
    max_guidance_sigma = math.inf
    spherical: float | None = None

    def __init__(self, scheduler: SchedulerMixin, schedule: NoiseSchedule, visits: list[int] | None = None):
        self.schedule = schedule
        self._visit(list(reversed(range(len(schedule)))) if visits is None else visits)
        self.prediction_type = scheduler.config.get("prediction_type")
        self.thresholds = thresholds(scheduler)
        self.clip_range = clip_range(scheduler)

    def _visit(self, visits: list[int]) -> None:
        self.visits = visits
        self.sigmas = self.schedule.sigma[visits].tolist()
        self.x_0_shifts = (self.schedule.sigma * self.schedule.noise_scale)[visits].tolist()

    @property
    def entries(self) -> dict[int, float]:
        """Timestep of each step of the run at which the run may begin, by the number of the step."""
        return dict(enumerate(self.schedule.timesteps[self.visits].tolist()))

    def begin_at(self, step: int) -> None:
        """
        Leaves out the steps of the run before a step.

        Args:
            step: Number of the step, one of `entries`.
        """
        self._visit(self.visits[step:])
        self.begin_part(self.visits[0])

    def repeat(self, counts: list[int]) -> None:
        """
        Takes steps of the run several times. In between, `renoise` adds noise up to the noise level of the step.

        Args:
            counts: Number of times that each step of the run is taken.
        """
        self._visit([index for index, count in zip(self.visits, counts) for _ in range(count)])

    def begin(
        self, x_T: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Returns the images of the first step.

        Args:
            x_T: Noise of standard deviation 1, `(batch, channels, height, width)`.
            generator: Generator of further noise, one for all images or one per image.
        """
        return x_T

    def predict(self, model_output: torch.Tensor, index: int, x_t: torch.Tensor) -> Denoised:
        """
        Computes the predicted x_0 from the output of a network. If the scheduler clips, x_0 is clipped here, before guidance. It is
        not clipped after guidance.

        Args:
            model_output: Output of the network at x_t, `(batch, channels or 2 * channels, height, width)`, float32.
            index: Step in the schedule: 0 is the least noisy.
            x_t: Noised images, `(batch, channels, height, width)`, float32.
        """
        prediction, variance_interpolation = split_learned_variance(model_output, x_t.shape[1])
        x_0 = x_0_from_prediction(self.schedule, x_t, index, prediction, self.prediction_type)
        return Denoised(self.clip(x_0), self.log_variance(variance_interpolation, index, x_t))

    def clip(self, x_0: torch.Tensor) -> torch.Tensor:
        """Returns the predicted x_0, clipped if the scheduler clips."""
        return x_0 if self.clip_range is None else x_0.clamp(-self.clip_range, self.clip_range)

    def log_variance(
        self, variance_interpolation: torch.Tensor | None, index: int, x_t: torch.Tensor
    ) -> torch.Tensor | float | None:
        """Returns the log-variance of the step, or `None` if the solver does not need it."""
        return None

    def step(
        self,
        denoised: Denoised,
        index: int,
        x_t: torch.Tensor,
        gradient: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draws x_{t-1}, `(batch, channels, height, width)`.

        Args:
            denoised: Prediction at x_t.
            index: Step in the schedule.
            x_t: Noised images, `(batch, channels, height, width)`.
            gradient: Gradient of log p(y | x_t), times the guidance scale, of the shape of x_t. `None` without guidance.
            generator: Generator of the step's noise, one for all images or one per image.
        """
        raise NotImplementedError

    def renoise(
        self, x: torch.Tensor, step: int, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Adds noise if the next step of the run is noisier than the images, as in RePaint (Lugmayr et al. 2022, arXiv 2201.09865,
        Algorithm 1) and Restart (Xu et al. 2023, arXiv 2306.14878). Otherwise returns the images unchanged.

        Args:
            x: Images after a step, `(batch, channels, height, width)`.
            step: Number of that step in the run.
            generator: Generator of the noise, one for all images or one per image.
        """
        if step + 1 == len(self.visits) or not self.jumps_to(step + 1):
            return x
        self.begin_part(self.visits[step + 1])
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return renoise(self.schedule, x, self.visits[step] - 1, self.visits[step + 1], noise)

    def jumps_to(self, step: int) -> bool:
        """Returns whether noise is added before a step of the run, because the step is as noisy as the one before it or noisier."""
        return step > 0 and self.visits[step] >= self.visits[step - 1]

    def begin_part(self, index: int) -> None:
        """
        Forgets the predictions of earlier steps, because they do not belong to the descending part of the run that begins.

        Args:
            index: First step of the part, in the schedule.
        """

    def take_over(self, change: torch.Tensor, step: int) -> None:
        """
        Applies a change of x_t, by a callback, to what the solver keeps of earlier evaluations, so that the next steps do not undo it.

        Args:
            change: Difference of the images after and before the change, `(batch, channels, height, width)`.
            step: Number of the next step of the run.
        """
        if step < len(self.visits) and not self.jumps_to(step):  # before a jump, nothing is kept
            # With the same x_0, the change is one of epsilon, which is the same at all noise levels.
            index = self.visits[step]
            self.change_epsilon(change / read_table(self.schedule.noise_scale, index, change), index)

    def change_epsilon(self, change: torch.Tensor, index: int) -> None:
        """
        Changes epsilon in the images and predictions that the solver keeps of earlier evaluations.

        Args:
            change: Change of epsilon, `(batch, channels, height, width)`.
            index: Next evaluation, in the schedule.
        """


def check_variance_type(variance_type: str) -> None:
    """Raises a ValueError if a variance of DDPM is not supported."""
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"`variance_type` must be one of {VARIANCE_TYPES}, but got variance_type={variance_type!r}.")


class DDPMSolver(Solver):
    """
    One run of ancestral sampling. Guidance shifts the mean (Algorithm 1).

    Args:
        scheduler: Scheduler that the run belongs to.
        schedule: Timesteps of the run, least noisy first.
        visits: Indices into the schedule, in the order of the run.

    Raises:
        ValueError: If the scheduler's `variance_type` is not supported.
    """

    shifts_epsilon = False

    def __init__(self, scheduler: DDPMScheduler, schedule: NoiseSchedule, visits: list[int] | None = None):
        super().__init__(scheduler, schedule, visits)
        self.scheduler = scheduler
        variance_type = scheduler.config.variance_type
        check_variance_type(variance_type)
        learned = variance_type == "learned_range"
        self.fixed_log_variance = None if learned else fixed_log_variance(schedule, variance_type)

    def log_variance(
        self, variance_interpolation: torch.Tensor | None, index: int, x_t: torch.Tensor
    ) -> torch.Tensor | float:
        """Returns the log-variance of the step: a tensor of the shape of `x_t` if it is learned, a number if it is fixed."""
        if self.fixed_log_variance is None:
            return learned_log_variance(self.schedule, index, variance_interpolation)
        return read_table(self.fixed_log_variance, index, x_t)

    def mean(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor) -> torch.Tensor:
        """Returns the mean mu of the step before guidance, where `gradient_at="mean"` takes the gradient."""
        x_0 = self.scheduler._threshold_sample(x_0) if self.thresholds else x_0
        return posterior_mean(self.schedule, x_t, index, x_0)

    def step(
        self,
        denoised: Denoised,
        index: int,
        x_t: torch.Tensor,
        gradient: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draws x_{t-1} from N(mu + s * Sigma * grad log p(y | x_t), Sigma) [Algorithm 1], or from N(mu, Sigma) with noise that the
        gradient turns (spherical guidance). The arguments are those of `Solver.step`.
        """
        log_variance = denoised.log_variance
        mean = self.mean(denoised.x_0, index, x_t)  # mu
        if gradient is not None and self.spherical is None:
            mean = shift_mean(mean, log_variance, gradient)  # mu + s * Sigma * grad log p(y | x_t)
        if index == 0:
            return mean  # the last step adds no noise
        noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
        deviation = (0.5 * log_variance).exp() if self.fixed_log_variance is None else math.exp(0.5 * log_variance)
        if gradient is not None and self.spherical is not None:
            noise = spherical_noise(noise, deviation * gradient, self.spherical)
        return mean + deviation * noise

    def log_density_ratio(
        self, denoised: Denoised, index: int, x_t: torch.Tensor, gradient: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """
        Returns log N(x_{t-1}; mu, Sigma) - log N(x_{t-1}; mu + Sigma * gradient, Sigma), `(batch,)`: the log-density of what a guided
        step has drawn by the unguided step, minus that by the guided one.

        Args:
            denoised: Prediction at x_t.
            index: Step in the schedule.
            x_t: Noised images, `(batch, channels, height, width)`.
            gradient: Scaled gradient that has guided the step, of the shape of x_t.
            latents: x_{t-1}, of the shape of x_t.
        """
        log_variance = torch.as_tensor(denoised.log_variance, device=x_t.device)
        noise = latents - shift_mean(self.mean(denoised.x_0, index, x_t), log_variance, gradient)  # sqrt(Sigma) * z
        return -(gradient * (noise + 0.5 * log_variance.exp() * gradient)).sum(dim=(1, 2, 3))


class EpsilonSolver(Solver):
    """
    One run of a scheduler other than DDPM. Guidance shifts epsilon (Algorithm 2).

    With an exact gradient, the guided x_0 is the mean of all clean images of the class from which x_t may come. This mean lies in the
    range of images. The gradient of a trained classifier is not exact: it does not vanish as the noise grows. It is multiplied by
    sigma, which reaches 20291 with the cosine schedule. Therefore the shift of x_0 is limited.

    Args:
        scheduler: Scheduler that the run belongs to.
        schedule: Timesteps of the run, least noisy first.
        prepared: Local copy of the scheduler that takes the steps. It is given x_0 and does not clip it.
        timesteps: Timesteps of the copy, one per timestep of the schedule, in the same order.
        visits: Indices into the schedule, in the order of the run.
        max_x_0_shift: Default limit of the shift of the predicted x_0 by guidance, a root mean square per image.
        starts: Evaluations with which a step begins, as indices into the schedule. `None` means all.
        **step_kwargs: Arguments of the copy's `step`.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        schedule: NoiseSchedule,
        prepared: SchedulerMixin,
        timesteps: list[int] | torch.Tensor,
        visits: list[int] | None = None,
        max_x_0_shift: float | None = 0.5,
        starts: list[int] | None = None,
        **step_kwargs,
    ):
        super().__init__(scheduler, schedule, visits)
        self.scheduler = prepared
        self.max_x_0_shift = max_x_0_shift
        self.timesteps = timesteps
        self.starts = set(range(len(schedule)) if starts is None else starts)
        self.step_kwargs = step_kwargs
        self.takes_generator = "generator" in inspect.signature(prepared.step).parameters

    @property
    def entries(self) -> dict[int, float]:
        """Timestep of each step of the run at which the run may begin. It may not begin at the second evaluation of a step."""
        return {step: timestep for step, timestep in super().entries.items() if self.visits[step] in self.starts}

    def step(
        self,
        denoised: Denoised,
        index: int,
        x_t: torch.Tensor,
        gradient: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draws x_{t-1} by the scheduler, with the guided epsilon [Algorithm 2], or with noise that the gradient turns (spherical guidance).
        The arguments are those of `Solver.step`.
        """
        x_0 = denoised.x_0
        if gradient is not None and self.spherical is None:
            epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)  # from the clipped x_0, as in the original code
            noise_scale = read_table(self.schedule.noise_scale, index, x_t)
            epsilon = shift_epsilon(epsilon, noise_scale, gradient)  # epsilon - sqrt(1 - alpha_bar) * s * grad
            x_0 = x_0_from_epsilon(self.schedule, x_t, index, epsilon)
        step_kwargs = {**self.step_kwargs, "generator": generator} if self.takes_generator else self.step_kwargs
        if gradient is not None and self.spherical is not None:
            noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            step_kwargs = {**self.step_kwargs, "variance_noise": spherical_noise(noise, gradient, self.spherical)}
        return self.advance(x_0, index, x_t, **step_kwargs)

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns x_{t-1}, one step of the scheduler towards the guided x_0."""
        return self.scheduler.step(x_0, self.timesteps[index], x_t, **step_kwargs).prev_sample
