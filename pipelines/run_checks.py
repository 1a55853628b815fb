"""Checks of many calls that differ only in labels and noise, before the first image is drawn."""

from diffusers import DiffusionPipeline

from diffusers_adm.pipelines.class_labels import known_classes
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.pipelines.particles import check_particles
from diffusers_adm.pipelines.predictions import epsilon_scales
from diffusers_adm.pipelines.step_hooks import StepHooks


def check_run(pipeline: DiffusionPipeline, options: SamplingOptions) -> None:
    """
    Checks options as a call of the pipeline would. Images are assumed to have labels if the pipeline has classes.

    Args:
        pipeline: Pipeline of the run.
        options: Resolved options of the run, with one guidance scale and one weight for all images.

    Raises:
        ValueError: If an option is out of its range, or does not fit the models.
    """
    size = pipeline.unet.config.sample_size
    pipeline._check_call(options, 1, size, size, generator=None, output_type="latent", return_dict=True)
    solver = options.solver(pipeline)
    check_particles(pipeline, options, solver, 1, latents=None, hooks=StepHooks(pipeline))
    pipeline._guidance_factors(options, solver, has_labels=known_classes(pipeline) is not None, batch_size=1)
    epsilon_scales(pipeline, options, solver)
