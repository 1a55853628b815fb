"""Functions that a caller hooks into the steps of a run."""

from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from diffusers_adm.guidance import FiniteCheck
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.pipelines.sampling_steps import SamplingStep
from diffusers_adm.solvers import Denoised


class StepHooks:
    """
    Functions that the caller of a pipeline hooks into its steps.

    Order of a step: `callback_on_step_start` with x_t; then the predicted x_0 is clipped if the scheduler clips, and `x_0_fn`
    may replace it; then guidance and the scheduler's step; then `callback_on_step_end`.

    Args:
        pipeline: Pipeline that the callbacks are given.
        x_0_fn: Function `x_0_fn(x_0, timestep)` that replaces the predicted x_0.
        on_step_start: Function `on_step_start(pipeline, step, timestep, {"latents": x_t})`.
        on_step_end: Function `on_step_end(pipeline, step, timestep, tensors)`.
        end_inputs: Names of the tensors that `on_step_end` is given.

    Raises:
        ValueError: If a hook is not a function, or a tensor has another name.
    """

    TENSORS = ["latents", "x_0", "gradient", "log_probabilities"]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        x_0_fn: Callable | None = None,
        on_step_start: Callable | None = None,
        on_step_end: Callable | None = None,
        end_inputs: list[str] | tuple[str, ...] = (),
    ):
        check_function("x_0_fn", x_0_fn)
        check_function("callback_on_step_start", on_step_start)
        check_function("callback_on_step_end", on_step_end)
        unknown = (
            [name for name in end_inputs if name not in self.TENSORS]
            if isinstance(end_inputs, (list, tuple))
            else True
        )
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of names among {self.TENSORS}, but got {end_inputs!r}."
            )
        self.pipeline = pipeline
        self.x_0_fn = x_0_fn
        self.on_step_start = on_step_start
        self.on_step_end = on_step_end
        self.end_inputs = end_inputs
        self.finite = FiniteCheck("The output of `x_0_fn` for")

    def start(self, step: int, timestep: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Returns x_t, or what `callback_on_step_start` puts in its place, `(batch, channels, height, width)`."""
        if self.on_step_start is None:
            return x_t
        returned = self.on_step_start(self.pipeline, step, timestep, {"latents": x_t})
        return returned_latents(returned, x_t, "callback_on_step_start")

    def x_0(self, step: int, timestep: torch.Tensor, denoised: Denoised) -> Denoised:
        """Returns the prediction, or one with what `x_0_fn` puts in the place of its x_0."""
        if self.x_0_fn is None:
            return denoised
        x_0 = as_returned(self.x_0_fn(denoised.x_0, timestep), denoised.x_0, "x_0_fn")
        self.finite.see(x_0, step)
        return replace(denoised, x_0=x_0)

    def end(self, taken: SamplingStep) -> torch.Tensor:
        """Returns the latents, or what `callback_on_step_end` puts in their place, `(batch, channels, height, width)`."""
        if self.on_step_end is None:
            return taken.latents
        given = {name: getattr(taken, name) for name in self.end_inputs}
        returned = self.on_step_end(self.pipeline, taken.index, taken.timestep, given)
        return returned_latents(returned, taken.latents, "callback_on_step_end")


def check_function(name: str, function: Callable | None) -> None:
    """Raises a ValueError unless an argument is a function or `None`. A classifier is a component, not a function."""
    if function is not None and (not callable(function) or isinstance(function, NoisyClassifier)):
        raise ValueError(f"{name} must be a function: got {type(function).__name__}.")


def as_returned(returned: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """
    Returns what a user's function made of a tensor, in that tensor's dtype.

    Raises:
        ValueError: If it is not a tensor of real numbers of the same shape, on the same device.
    """
    is_tensor = isinstance(returned, torch.Tensor)
    if not is_tensor or returned.shape != like.shape or returned.is_complex() or returned.device != like.device:
        got = f"{tuple(returned.shape)}, {returned.dtype}, {returned.device}" if is_tensor else type(returned).__name__
        raise ValueError(
            f"{name} returned {got}, where a tensor of real numbers, {tuple(like.shape)}, on {like.device} is needed."
        )
    return returned.to(like.dtype)


def returned_latents(outputs: dict, latents: torch.Tensor, name: str) -> torch.Tensor:
    """
    Returns the latents that a callback returned, or else those that it was given.

    Raises:
        ValueError: If it returned no dict, or latents that are not a tensor of the same shape.
    """
    if not isinstance(outputs, dict):
        raise ValueError(f"{name} returned {type(outputs).__name__}, where a dict, of latents or empty, is needed.")
    return as_returned(outputs.pop("latents", latents), latents, f"{name}, as latents,")
