"""Runs with several particles per image."""

from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from diffusers_adm.checks import is_integer
from diffusers_adm.guidance import GuidanceOptions
from diffusers_adm.guidance.combination import parse_guider
from diffusers_adm.pipelines.options import SamplingOptions, per_image
from diffusers_adm.pipelines.step_hooks import StepHooks
from diffusers_adm.solvers import DDPMSolver, Solver


def check_particles(
    pipeline: DiffusionPipeline,
    options: SamplingOptions,
    solver: Solver,
    batch_size: int,
    latents: torch.Tensor | None,
    hooks: StepHooks,
) -> None:
    """
    Checks a run with several particles per image.

    Args:
        pipeline: Pipeline of the run.
        options: Resolved options of the run.
        solver: Run of the scheduler.
        batch_size: Number of images.
        latents: x_T of the caller, or `None`.
        hooks: Functions of the caller.

    Raises:
        ValueError: If the number is not an integer of at least 1, or something does not go together with particles.
    """
    particles = options.particles
    if particles is not None and (not is_integer(particles) or particles < 1):
        raise ValueError(f"`particles` must be an integer of at least 1, but got {particles!r}.")
    if particles in (None, 1):
        return
    if not isinstance(solver, DDPMSolver):
        name = type(pipeline.scheduler).__name__
        raise ValueError(f"`particles` requires DDPMScheduler, whose steps have a known density, but got {name}.")
    if any(later >= earlier for earlier, later in zip(solver.visits, solver.visits[1:])):
        raise ValueError("`particles` requires timesteps that only go down, but `timesteps` jumps back up.")
    if not any(per_image(options.guidance_scale, batch_size, "guidance_scale")):
        raise ValueError(
            "`particles` requires a `guidance_scale` that is not 0, because guidance weights the particles."
        )
    guidance_options = GuidanceOptions.parse(options.guidance_options)
    if guidance_options.gradient_at != "x_t":
        raise ValueError("`particles` requires gradient_at='x_t', because particles are weighted at x_t.")
    if not guidance_options.has_known_density:
        raise ValueError(
            "`particles` does not go together with x_0_weight, smoothing, recurrence and spherical of `guidance_options`, whose steps have"
            " no known density."
        )
    guider = None if options.guider is None else parse_guider(options.guider)
    if getattr(guider, "adaptive_projected_guidance_momentum", None) is not None:
        raise ValueError(
            "`particles` does not go together with a `guider` with momentum, because each step must depend on x_t alone. Pass"
            " adaptive_projected_guidance_momentum=None."
        )
    if latents is not None:
        raise ValueError(
            "`particles` requires that x_T is drawn, because each particle has its own. Leave out `latents`."
        )
    if hooks.on_step_start is not None or hooks.on_step_end is not None:
        raise ValueError(
            "`particles` does not go together with callbacks, which may replace x_t. Use `pipeline.steps`."
        )


def repeated(given: list | object, particles: int) -> list | object:
    """Returns a list with each entry repeated for each particle. What is not a list is returned as it is."""
    return [entry for entry in given for _ in range(particles)] if isinstance(given, list) else given


def for_particles(options: SamplingOptions, batch_size: int) -> SamplingOptions:
    """Returns the options of a run with one scale and weight per particle."""
    changes = {
        name: repeated(per_image(getattr(options, name), batch_size, name), options.particles)
        for name in ("guidance_scale", "cfg_weight")
    }
    return replace(options, **changes)
