"""Schedulers of diffusers that sample as the original scripts do with given flags."""

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    SchedulerMixin,
)

from diffusers_adm.choices import BETA_SCHEDULES
from diffusers_adm.openai.flags import Flags
from diffusers_adm.respacing import consistency_steps, respaced_timesteps


CONSISTENCY_SAMPLERS = ("onestep", "multistep")


def build_scheduler(flags: Flags, learns_variance: bool) -> DDPMScheduler | DDIMScheduler:
    """
    Builds the stock scheduler that samples as the original scripts do with these flags.

    Args:
        flags: Flags of the UNet.
        learns_variance: Whether the UNet has a learned variance.

    Raises:
        ValueError: If the flags do not describe a diffusion process.
    """
    steps, noise_schedule = flags["diffusion_steps"], flags["noise_schedule"]
    if noise_schedule not in BETA_SCHEDULES:
        raise ValueError(f"--noise_schedule {noise_schedule} is not one of {sorted(BETA_SCHEDULES)}.")
    if steps < 1:
        raise ValueError(f"--diffusion_steps must be at least 1: got {steps}.")
    # The original code scales the linear schedule, so that it ends at the same noise level as with 1000 steps.
    beta_start, beta_end = 1000 / steps * 1e-4, 1000 / steps * 0.02
    if noise_schedule == "linear" and beta_end > 1:
        raise ValueError(f"--noise_schedule linear needs --diffusion_steps of at least 20: got {steps}.")
    respaced_timesteps(flags["timestep_respacing"], steps)  # raises a ValueError if it is not supported
    kwargs = {
        "num_train_timesteps": steps,
        "beta_schedule": BETA_SCHEDULES[noise_schedule],
        "beta_start": beta_start,
        "beta_end": beta_end,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": flags["clip_denoised"],
    }
    if flags["use_ddim"]:
        return DDIMScheduler(timestep_spacing="leading", **kwargs)
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    variance_type = "learned_range" if learns_variance else fixed
    return DDPMScheduler(variance_type=variance_type, timestep_spacing="linspace", **kwargs)


def sampler_of(flags: Flags) -> str:
    """
    Returns the sampler of a model of consistency_models. The default is Heun's method for EDM, and one step for consistency models.
    """
    if "sampler" in flags or flags["training_mode"] == "edm":
        return flags["sampler"]
    return "onestep"


def build_sigma_scheduler(flags: Flags) -> SchedulerMixin:
    """
    Builds the stock scheduler that samples as the scripts of consistency_models do with these flags.

    Raises:
        ValueError: If the sampler is unknown, or does not fit the model, or the flags do not describe its steps.
    """
    sampler, steps, clips = sampler_of(flags), flags["steps"], flags["clip_denoised"]
    levels = {"sigma_min": flags["sigma_min"], "sigma_max": flags["sigma_max"]}
    # Solvers read this entry of all schedulers. EDMEulerScheduler is left out, because it warns of entries that it does not know.
    clipping = {"clip_sample": clips}
    schedulers = {
        "heun": lambda: HeunDiscreteScheduler(use_karras_sigmas=True, clip_sample=clips),
        "euler": lambda: EDMEulerScheduler(**levels) if clips else EulerDiscreteScheduler.from_config(clipping),
        "ancestral": lambda: EulerAncestralDiscreteScheduler.from_config(clipping),
        "dpm": lambda: KDPM2DiscreteScheduler.from_config(clipping),
    }
    schedulers |= dict.fromkeys(
        CONSISTENCY_SAMPLERS,
        lambda: CMStochasticIterativeScheduler(num_train_timesteps=steps, clip_denoised=clips, **levels),
    )
    if sampler not in schedulers:
        raise ValueError(f"--sampler must be one of {', '.join(schedulers)}, but got {sampler}.")
    if sampler in CONSISTENCY_SAMPLERS and flags["training_mode"] == "edm":
        raise ValueError(f"--sampler {sampler} requires a consistency model, but got --training_mode edm.")
    if sampler in CONSISTENCY_SAMPLERS and steps < 2:
        raise ValueError(f"--steps must be at least 2 with --sampler {sampler}, but got {steps}.")
    if sampler == "multistep" and not flags["ts"]:
        raise ValueError("--ts is required with --sampler multistep: give its steps, such as 0,22,39.")
    if sampler == "multistep":  # raises a ValueError if the steps have another form
        consistency_steps(flags["ts"], steps, given=f"--ts {flags['ts']}")
    return schedulers[sampler]()
