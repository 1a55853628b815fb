"""Schedulers by name, for the command line and for sweeps."""

from diffusers import DDPMScheduler, PNDMScheduler

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.solvers import GUIDED_SETTINGS, SIGMA_SCHEDULERS, SUPPORTED_SCHEDULERS


# Class of each scheduler, and settings beside those of the noise schedule.
SCHEDULERS = {scheduler.__name__.removesuffix("Scheduler"): (scheduler, {}) for scheduler in SUPPORTED_SCHEDULERS}
SCHEDULERS["PNDM"] = (PNDMScheduler, {"skip_prk_steps": True})
SCHEDULERS |= {
    scheduler.__name__.removesuffix("Scheduler") + "-guided": (scheduler, settings)
    for scheduler, settings in GUIDED_SETTINGS.items()
}
# Few of their steps, which are straight in sigma, go astray unless placed as by Karras et al. 2022 (arXiv 2206.00364, eq. 5).
SCHEDULERS |= {
    f"{name}-Karras": (SCHEDULERS[name][0], {"use_karras_sigmas": True}) for name in ("HeunDiscrete", "KDPM2Discrete")
}
# Schedulers of UNets with preconditioning alone.
PRECONDITIONED_SCHEDULERS = {
    scheduler.__name__.removesuffix("Scheduler"): (scheduler, {})
    for scheduler in SIGMA_SCHEDULERS
    if scheduler not in SUPPORTED_SCHEDULERS
}

SamplingPipeline = ClassifierGuidedPipeline | ADMUpsamplePipeline


def set_scheduler(pipeline: SamplingPipeline, name: str | None) -> None:
    """
    Replaces a pipeline's scheduler by another of the same noise schedule.

    Args:
        pipeline: Pipeline to change.
        name: Name in `SCHEDULERS` or `PRECONDITIONED_SCHEDULERS`. `None` keeps the scheduler.
    """
    if name is None:
        return
    scheduler_class, settings = (SCHEDULERS | PRECONDITIONED_SCHEDULERS)[name]
    if type(pipeline.scheduler) is scheduler_class and not settings:
        return
    if scheduler_class is DDPMScheduler:
        settings = {"variance_type": "learned_range" if pipeline.unet.learns_variance else "fixed_large"}
    unet, config = pipeline.unet.config, pipeline.scheduler.config
    if name in PRECONDITIONED_SCHEDULERS:  # they share no noise schedule with the others
        pipeline.scheduler = scheduler_class(sigma_min=unet.sigma_min, sigma_max=unet.sigma_max)
    else:
        pipeline.scheduler = scheduler_class.from_config(config, **settings)
    if unet.get("preconditioning") is not None:  # their schedulers name the setting differently, or have none
        clips = config.get("clip_sample", config.get("clip_denoised", True))
        pipeline.scheduler.register_to_config(clip_sample=clips)
