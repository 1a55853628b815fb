"""Schedulers by name, for the command line and for sweeps."""

import diffusers
from diffusers import DDPMScheduler, PNDMScheduler

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.evaluation.options import PRECONDITIONED_SCHEDULERS
from diffusers_adm.solvers import GUIDED_SETTINGS, full_config


SamplingPipeline = ClassifierGuidedPipeline | ADMUpsamplePipeline


def set_scheduler(pipeline: SamplingPipeline, name: str | None) -> None:
    """
    Replaces the scheduler of a pipeline by another scheduler with the same noise schedule.

    Args:
        pipeline: Pipeline to change.
        name: Name in `SCHEDULERS` or `PRECONDITIONED_SCHEDULERS` of `evaluation.options`. `None` keeps the scheduler.
    """
    if name is None:
        return
    kind, _, variant = name.partition("-")
    scheduler_class = getattr(diffusers, f"{kind}Scheduler")
    settings = {}
    if variant == "guided":
        settings = GUIDED_SETTINGS[scheduler_class]
    elif variant == "Karras":
        settings = {"use_karras_sigmas": True}
    elif scheduler_class is PNDMScheduler:
        settings = {"skip_prk_steps": True}
    if type(pipeline.scheduler) is scheduler_class and not settings:
        return
    if scheduler_class is DDPMScheduler:
        settings = {"variance_type": "learned_range" if pipeline.unet.learns_variance else "fixed_large"}
    unet = pipeline.unet.config
    config = full_config(pipeline.scheduler)
    if name in PRECONDITIONED_SCHEDULERS:  # these have no noise schedule to keep
        pipeline.scheduler = scheduler_class(sigma_min=unet.sigma_min, sigma_max=unet.sigma_max)
    else:
        pipeline.scheduler = scheduler_class.from_config(config, **settings)
    if unet.get("preconditioning") is not None:  # their schedulers name the setting differently, or have none
        clips = config.get("clip_sample", config.get("clip_denoised", True))
        pipeline.scheduler.register_to_config(clip_sample=clips)
