"""Guidance during one run: the steps at which it acts, its strength, and the images that it guides."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from diffusers_adm.diffusion import normalized
from diffusers_adm.guidance.functions import RunClassifierGuidance
from diffusers_adm.guidance.gradient import (
    GuidanceFunction,
    differentiable,
    frozen,
    guidance_gradient,
    leaf,
    recomputed,
    shortened,
    weights_in_place,
    without_gradients,
)
from diffusers_adm.guidance.options import GuidanceOptions
from diffusers_adm.guidance.training_free import GuidanceAtX0, SmoothedGuidance, log_probability
from diffusers_adm.solvers import Denoised, Solver
from diffusers_adm.solvers.algorithms import HIGH_NOISE_LEVEL


class Guider:
    """
    Guidance of one run. It computes the scaled gradient s * grad log p(y | x_t) and keeps what later steps reuse.

    Args:
        guidance_fn: Guidance function, see the docstring of `diffusers_adm.guidance`. `None` means no guidance.
        options: Steps at which guidance acts, and its strength.
        solver: Solver of the run.
        factors: Factor of the guidance scale at each step of the run. It is 0 at steps without guidance.
        class_labels: Class of each image, `(batch,)`, or `None`.
        through_half: Whether a gradient through the UNet passes through float16 weights.
        check_scales: Function that is called with the guidance scale of each image after a change. It raises a `ValueError` if a
            scale is invalid.
        generator: Generator of the noise of smoothing, one for all images or one per image.
        with_gradients: Whether the gradients of guidance are differentiable themselves.
    """

    def __init__(
        self,
        guidance_fn: GuidanceFunction | None,
        options: GuidanceOptions,
        solver: Solver,
        factors: list[float],
        class_labels: torch.Tensor | None,
        through_half: bool = False,
        check_scales: Callable[[list[float]], None] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        with_gradients: bool = False,
    ):
        self.guidance_fn = guidance_fn
        self.options = options
        self.solver = solver
        self.class_labels = class_labels
        self.through_unet = options.goes_through_unet(guidance_fn)
        self.independent_rows = getattr(guidance_fn, "independent_rows", False)
        self.through_half = through_half
        self.check_scales = check_scales
        self.generator = generator
        self.with_gradients = with_gradients
        self.factors = self._limited_factors(factors)
        self.max_sizes = self._largest_sizes()
        jumps = [step for step in range(len(solver.visits)) if solver.jumps_to(step)]
        self.step_counts = options.gradient_steps(self.factors, jumps)
        self.scales: list[float] | None = None  # one per image
        self.rows: list[int] = []  # indices of the guided images
        self.last_gradient: torch.Tensor | None = None  # not yet multiplied by scale and factor
        # Of this step's gradient, if it has evaluated the classifier for all images.
        self.log_probabilities: torch.Tensor | None = None
        self.classified: torch.Tensor | None = None  # the x_t that they belong to
        self.finite = FiniteCheck("The guidance gradient of")

    def _limited_factors(self, factors: list[float]) -> list[float]:
        """Sets the factors above the solver's default highest noise level to 0, unless no factor would be left."""
        if self.options.max_x_0_shift != "auto" or self.options.interval is not None:
            return factors
        limit = self.solver.max_guidance_sigma
        limited = [factor if sigma <= limit else 0.0 for sigma, factor in zip(self.solver.sigmas, factors)]
        return limited if any(limited) else factors

    @property
    def max_x_0_shift(self) -> float | None:
        """Largest root mean square of the shift of the predicted x_0. `None` means no limit."""
        limit = self.options.max_x_0_shift
        return self.solver.max_x_0_shift if limit == "auto" else limit

    def _largest_sizes(self) -> list[float] | None:
        """Returns the largest root mean square of the scaled gradient at each step. `None` means no limit."""
        max_shift = self.max_x_0_shift
        return None if max_shift is None else [max_shift / shift for shift in self.solver.x_0_shifts]

    def begin_step(self, step: int, scales: list[float], x_t: torch.Tensor) -> None:
        """
        Decides whether the step is guided, and whether it needs a new gradient.

        Args:
            step: Number of the step in the run.
            scales: Guidance scale of each image. Callbacks may change them between steps.
            x_t: Noised images, on the device and of the dtype of the gradients.
        """
        self.step = step
        self.log_probabilities = self.classified = None
        if scales != self.scales:
            self._take_scales(scales, x_t)
        self.acts = bool(self.rows) and self.factors[step] != 0
        self.shifts = self.acts and self.options.x_t_weight != 0
        self.needs_gradient = self.shifts and (step in self.step_counts or self.last_gradient is None)

    def _take_scales(self, scales: list[float], x_t: torch.Tensor) -> None:
        if self.check_scales is not None:
            self.check_scales(scales)
        self.scales = scales
        rows = [row for row, scale in enumerate(scales) if scale]
        if not set(rows) <= set(self.rows):
            self.last_gradient = None  # newly guided images have no gradient to reuse
        self.rows = rows
        if rows and self.options.max_x_0_shift == "auto":
            self._warn_of_high_noise()
        self.scale = x_t.new_tensor(scales)[:, None, None, None]  # (batch, 1, 1, 1)
        # A classifier is evaluated only on the guided images, because the others need no gradient.
        whole = not self.independent_rows or len(rows) == len(scales)
        self.asked_rows = None if whole else torch.tensor(rows, dtype=torch.long, device=x_t.device)

    def _warn_of_high_noise(self) -> None:
        highest = max((sigma for sigma, factor in zip(self.solver.sigmas, self.factors) if factor), default=0.0)
        if self.solver.shifts_epsilon and self.max_sizes is None and highest > HIGH_NOISE_LEVEL:
            warnings.warn(
                f"Guidance begins at noise level {highest:.0f}. There, small errors of the gradient move the predicted x_0 far out"
                " of the range of images, as in the original code. If colours are oversaturated, pass"
                " guidance_options={'max_x_0_shift': 0.5}.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def tracking(self, x_t: torch.Tensor, unet: torch.nn.Module) -> Iterator[torch.Tensor]:
        """
        Yields the noised images to give to the UNet. If this step's gradient goes through the UNet, they are a leaf that requires a
        gradient, which must be computed within the context.
        """
        if self.needs_gradient and self.through_unet:
            with differentiable(), frozen(weights_in_place(unet)):
                yield leaf(x_t)
        else:
            yield x_t

    def gradient(self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor | None:
        """
        Returns s * grad log p(y | x_t), `(batch, channels, height, width)`, or `None` if no gradient shifts the step.

        Args:
            x_t: Noised images that `tracking` has yielded, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`.
            x_0: Predicted clean images, `(batch, channels, height, width)`.

        Raises:
            ValueError: If the gradient goes through the UNet, but `x_0` does not depend on x_t.
        """
        if not self.shifts or (not self.needs_gradient and self.options.skipped == "sum"):
            return None
        if self.needs_gradient:
            if not self.through_unet and not self.with_gradients:
                x_0 = x_0.detach()  # x_0_fn may return a tensor with a graph
            self.last_gradient = self._new_gradient(x_t, timestep, x_0)
        count = self.step_counts.get(self.step, 1)
        gradient = self._scaled(self.last_gradient, self.options.x_t_weight * count)
        if self.max_sizes is not None:
            gradient = shortened(gradient, self.max_sizes[self.step])
        self.finite.see(gradient, self.step)
        return gradient

    def select(self, rows: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """
        Returns rows of a gradient, or `None` without one. Later steps reuse the same rows of the kept gradient.

        Args:
            rows: Rows of a batch that take the place of all its rows, `(batch,)`.
            gradient: Scaled gradient, `(batch, channels, height, width)`, or `None`.
        """
        if self.last_gradient is not None:
            self.last_gradient = self.last_gradient[rows]
        return None if gradient is None else gradient[rows]

    def move(self, denoised: Denoised, x_t: torch.Tensor, timestep: torch.Tensor) -> Denoised:
        """
        Returns the prediction with an x_0 that has been moved up the gradient with respect to x_0, if the options ask for it.

        Args:
            denoised: Prediction at x_t.
            x_t: Noised images, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`.
        """
        if not self.acts or self.options.x_0_weight == 0:
            return denoised
        guidance_fn, move = GuidanceAtX0(self._smoothed_function(), self.with_gradients), torch.zeros_like(x_t)
        for _ in range(self.options.x_0_iterations):
            gradient = self._differentiate(guidance_fn, x_t, timestep, denoised.x_0 + move, self.class_labels)
            gradient = normalized(gradient) if self.options.normalize else gradient
            move = move + self._scaled(gradient, self.options.x_0_weight)
            if self.max_x_0_shift is not None:
                move = shortened(move, self.max_x_0_shift)
        self.finite.see(move, self.step)
        return replace(denoised, x_0=denoised.x_0 + move)

    def _scaled(self, gradient: torch.Tensor, weight: float) -> torch.Tensor:
        """Returns a gradient times the guidance scale, the factor of the step and a weight, with the size that the options allow."""
        gradient = gradient * self.scale * (self.factors[self.step] * weight)
        return gradient if self.options.max_size is None else shortened(gradient, self.options.max_size)

    def _smoothed_function(self) -> GuidanceFunction:
        """Returns the guidance function of this step."""
        if not self.options.smoothing:
            return self.guidance_fn
        sigma = self.solver.sigmas[self.step]
        deviation = self.options.smoothing * sigma / (1 + sigma**2) ** 0.5  # gamma * sqrt(1 - alpha_bar)
        return SmoothedGuidance(self.guidance_fn, deviation, self.options.smoothing_samples, self.generator, self.rows)

    def _new_gradient(self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        if self.through_unet and not x_0.requires_grad:
            raise ValueError(
                "`x_0_fn` must return a tensor that depends on x_0, because `guidance_fn` guides through the UNet"
                " (through_unet=True)."
            )
        step_x_t = x_t
        if self.options.gradient_at == "mean":
            index = self.solver.visits[self.step]
            x_t = self.solver.mean(x_0, index, x_t)
            timestep = torch.full_like(timestep, self.solver.schedule.timesteps[max(index - 1, 0)].item())
        if self.asked_rows is None:
            inputs = (x_t, timestep, x_0, self.class_labels)
            gradient = self._differentiate(self._smoothed_function(), *inputs, through_half=self.through_half)
            self.log_probabilities = getattr(self.guidance_fn, "last_log_probabilities", None)
            self.classified = step_x_t
        else:
            asked = [tensor[self.asked_rows] for tensor in (x_t, timestep, x_0, self.class_labels)]
            gradient = torch.zeros_like(x_t)
            gradient[self.asked_rows] = self._differentiate(self.guidance_fn, *asked)
        return normalized(gradient) if self.options.normalize else gradient

    def _differentiate(
        self, guidance_fn: GuidanceFunction, *inputs: torch.Tensor | None, through_half: bool = False
    ) -> torch.Tensor:
        if self.with_gradients:
            return recomputed(guidance_gradient, guidance_fn, *inputs, create_graph=True)
        return guidance_gradient(guidance_fn, *inputs, through_half)

    def classification(self, x_t: torch.Tensor, timestep: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        """
        Returns a function that returns the log-probability of each class at this step, `(batch, num_classes)`, or `None` without
        a classifier. If the step's gradient has not evaluated the classifier for all images, the first call does.

        Args:
            x_t: Noised images of the step, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`.
        """
        known = self.log_probabilities if x_t is self.classified else None  # particles may have been drawn anew since
        guidance_fn = self.guidance_fn
        if known is not None or not isinstance(guidance_fn, RunClassifierGuidance):
            return lambda: known

        @functools.cache
        @without_gradients()
        def classify() -> torch.Tensor:
            return guidance_fn.log_probabilities(x_t, timestep).detach()

        return classify

    def log_psi(self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """
        Returns s * log p(y | x_t), `(batch,)`, by which particles are weighted.

        Args:
            x_t: Noised images of the step, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`.
            x_0: Predicted clean images, `(batch, channels, height, width)`.

        Raises:
            ValueError: If the guidance function returns a gradient, which gives no weight.
        """
        log_probabilities = self.classification(x_t, timestep)()
        if log_probabilities is not None:
            value = log_probabilities.gather(1, self.class_labels[:, None])[:, 0]  # (batch,)
        else:
            value = self.guidance_fn(x_t, timestep, x_0, self.class_labels)
            value = log_probability(value, x_t, self.guidance_fn, "particles")
        return value.float() * self.scale.flatten()


class FiniteCheck:
    """
    Record of the first step at which a tensor was not finite, per image. `check` reads it once, after the run, because reading
    waits for the device.

    Args:
        name: Beginning of the error message, before "image 0 is not finite".
    """

    def __init__(self, name: str):
        self.name = name
        self.failed_at: torch.Tensor | None = None  # (batch,), -1 for images without a failure

    def see(self, tensor: torch.Tensor, step: int) -> None:
        """
        Records the step for each image with values that are not finite. An earlier record of the image stays.

        Args:
            tensor: Values of each image, `(batch, channels, height, width)`.
            step: Number of the step in the run.
        """
        if self.failed_at is None:
            self.failed_at = torch.full(tensor.shape[:1], -1, device=tensor.device)
        failed = ~tensor.flatten(1).isfinite().all(dim=1) & (self.failed_at < 0)
        self.failed_at = self.failed_at.masked_fill(failed, step)

    def check(self, timesteps: list[float]) -> None:
        """
        Checks that all recorded tensors were finite.

        Args:
            timesteps: Training timestep of each step of the run.

        Raises:
            ValueError: If a value was not finite. The message names the image, the step and the timestep.
        """
        for image, step in enumerate([] if self.failed_at is None else self.failed_at.tolist()):
            if step >= 0:
                raise ValueError(
                    f"{self.name} image {image} is not finite at step {step} of {len(timesteps)}, timestep {timesteps[step]}."
                )
