"""Hooks: functions of the caller that are called during the steps of a run."""

from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from diffusers_adm.guidance import FiniteCheck
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.pipelines.sampling_steps import SamplingStep
from diffusers_adm.solvers import Denoised, Solver


class StepHooks:
    """
    Functions of the caller that are called during the steps of a run.

    Order of a step:

    1. `callback_on_step_start` is called with x_t.
    2. The UNet predicts x_0, which is clipped if the scheduler clips.
    3. `x_0_fn` may replace the predicted x_0.
    4. Guidance and the scheduler's step follow.
    5. `callback_on_step_end` is called.

    Args:
        pipeline: Pipeline, which is passed to the callbacks.
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

    def start(self, solver: Solver, step: int, timestep: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """
        Calls `callback_on_step_start`, and tells the solver how x_t has changed. Returns x_t or its replacement,
        `(batch, channels, height, width)`.
        """
        if self.on_step_start is None:
            return x_t
        before = x_t.clone()  # the callback may change x_t in place
        returned = self.on_step_start(self.pipeline, step, timestep, {"latents": x_t})
        x_t = returned_latents(returned, x_t, "callback_on_step_start")
        solver.take_over(x_t - before, step)
        return x_t

    def x_0(self, step: int, timestep: torch.Tensor, denoised: Denoised) -> Denoised:
        """Calls `x_0_fn`. Returns the prediction, whose x_0 may be replaced."""
        if self.x_0_fn is None:
            return denoised
        x_0 = as_returned(self.x_0_fn(denoised.x_0, timestep), denoised.x_0, "The output of `x_0_fn`")
        self.finite.see(x_0, step)
        return replace(denoised, x_0=x_0)

    def end(self, solver: Solver, taken: SamplingStep) -> torch.Tensor:
        """
        Calls `callback_on_step_end`, and tells the solver how the latents have changed. Returns the latents or their replacement,
        `(batch, channels, height, width)`.
        """
        if self.on_step_end is None:
            return taken.latents
        before = taken.latents.clone()  # the callback may change them in place
        given = {name: getattr(taken, name) for name in self.end_inputs}
        returned = self.on_step_end(self.pipeline, taken.index, taken.timestep, given)
        latents = returned_latents(returned, taken.latents, "callback_on_step_end")
        solver.take_over(latents - before, taken.index + 1)
        return latents


def check_function(name: str, function: Callable | None) -> None:
    """Raises a ValueError if an argument is neither a function nor `None`. A classifier does not count as a function."""
    if function is not None and (not callable(function) or isinstance(function, NoisyClassifier)):
        raise ValueError(f"`{name}` must be a function, but got {type(function).__name__}.")


def as_returned(returned: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """
    Checks a tensor that a user's function returned, and casts it to the dtype of the tensor that it replaces.

    Args:
        returned: Tensor that the function returned.
        like: Tensor that is replaced.
        name: Description of the returned tensor, for the error message.

    Raises:
        ValueError: If it is not a tensor of real numbers of the same shape, on the same device.
    """
    is_tensor = isinstance(returned, torch.Tensor)
    if not is_tensor or returned.shape != like.shape or returned.is_complex() or returned.device != like.device:
        got = f"{tuple(returned.shape)}, {returned.dtype}, {returned.device}" if is_tensor else type(returned).__name__
        raise ValueError(
            f"{name} must be a tensor of real numbers, {tuple(like.shape)}, on {like.device}, but got {got}."
        )
    return returned.to(like.dtype)


def returned_latents(outputs: dict, latents: torch.Tensor, name: str) -> torch.Tensor:
    """
    Returns the latents that a callback returned. If it returned none, returns the latents that it was given.

    Raises:
        ValueError: If it did not return a dict, or returned latents that are not a tensor of the same shape.
    """
    if not isinstance(outputs, dict):
        raise ValueError(
            f"`{name}` must return a dict, which may contain latents or be empty, but it returned {type(outputs).__name__}."
        )
    return as_returned(outputs.get("latents", latents), latents, f"The latents that `{name}` returns")
