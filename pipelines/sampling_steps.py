"""Steps of a run, which `pipeline.steps(...)` yields one at a time. The call of a pipeline is a loop over them."""

import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from diffusers import ImagePipelineOutput


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


@dataclass(frozen=True, eq=False)
class SamplingStep:
    """
    One step of a run. Heun's method and DPM-Solver-2 (KDPM2) evaluate the UNet twice per step, and PNDM twice in the first step. Each
    evaluation is one `SamplingStep`.

    Tensors are float32 and belong to the run. You can read and copy them, but only callbacks may change them. Tensors of earlier steps
    stay valid.

    In a run with K `particles` per image, the batch of each tensor holds all particles: row i * K + k is particle k of image i.

    Args:
        index: Number of the step in the run, from 0 to `num_steps - 1`.
        num_steps: Number of steps of the run.
        timestep: Training timestep, or noise level for a UNet with preconditioning, `()`.
        sigma: Noise level sqrt((1 - alpha_bar) / alpha_bar) at which the step begins, as in `GuidanceOptions.interval`.
        class_labels: Class of each row, given or drawn, `(batch,)`. `None` without classes.
        x_t: Noised images at which the step begins, `(batch, channels, height, width)`.
        x_0: Predicted x_0 at x_t, before guidance, `(batch, channels, height, width)`. It is in [-1, 1] if the scheduler clips.
        gradient: Scaled gradient that guided the step, `(batch, channels, height, width)`. `None` if the step was not guided.
        latents: Images after the step, `(batch, channels, height, width)`. After the last step, they are the final x_0.
        log_weights: Logarithm of the weight of each particle, up to a constant per image, `(images, particles)`. `None` without
            particles.
    """

    index: int
    num_steps: int
    timestep: torch.Tensor
    sigma: float
    class_labels: torch.Tensor | None = field(repr=False)
    x_t: torch.Tensor = field(repr=False)
    x_0: torch.Tensor = field(repr=False)
    gradient: torch.Tensor | None = field(repr=False)
    latents: torch.Tensor = field(repr=False)
    log_weights: torch.Tensor | None = field(repr=False)
    _classify: Callable[[], torch.Tensor | None] = field(repr=False)
    _make_images: Callable[[torch.Tensor], list | torch.Tensor] = field(repr=False)

    @property
    def log_probabilities(self) -> torch.Tensor | None:
        """
        Log-probability log p(y | x_t) of each class by the pipeline's classifier, `(batch, num_classes)`. `None` without a classifier,
        or if a `guidance_fn` guides instead.

        They cost nothing if the gradient of the step has evaluated the classifier for all images. Otherwise, the classifier is evaluated
        when they are first read. With `gradient_at="mean"`, they are taken from the gradient and are at the mean of the step, not at x_t.
        """
        return self._classify()

    @property
    def images(self) -> list | torch.Tensor:
        """
        Latents as images of the `output_type` of the run. After the last step, they are the images that the call returns. With
        particles, they are the images of all particles, and the call returns one of them per image, drawn by `log_weights`.
        """
        return self._make_images(self.latents)

    @property
    def x_0_images(self) -> list | torch.Tensor:
        """Predicted x_0 as images of the `output_type` of the run, which show what the final images will look like."""
        return self._make_images(self.x_0)


SamplingSteps = Generator[SamplingStep, None, ImagePipelineOutput | tuple]


def take_all(steps: SamplingSteps) -> ImagePipelineOutput | tuple:
    """Takes the remaining steps of a run, and returns the return value of the pipeline's call."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def check_arguments(function: Callable, called: str, /, *args, **kwargs) -> None:
    """
    Raises a TypeError if a function cannot be called with these arguments.

    Args:
        function: Function to be called.
        called: Name of the function that the caller has called instead.
    """
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{called}: {error}") from None


def with_arguments_of(
    source: Callable[Arguments, object],
) -> Callable[[Callable[..., Returned]], Callable[Arguments, Returned]]:
    """
    Declares that a function passes its arguments on to another function. It copies the signature and the documented arguments of the
    other function, for type checkers, `help` and the documentation.

    Args:
        source: Function that declares and documents the arguments.
    """

    def decorate(function: Callable[..., Returned]) -> Callable[Arguments, Returned]:
        returned = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(source).replace(return_annotation=returned)
        function.__annotations__ = {**source.__annotations__, "return": returned}
        if function.__doc__ and source.__doc__:  # both are None under `python -OO`
            documented = inspect.cleandoc(source.__doc__).partition("Args:\n")[2].partition("\nReturns:")[0]
            summary, _, end = inspect.cleandoc(function.__doc__).partition("Returns:")
            function.__doc__ = f"{summary}Args:\n{documented}\nReturns:{end}"
        return function

    return decorate
