"""Whether a scheduler limits the predicted x_0, and how."""

import inspect

from diffusers import SchedulerMixin


def thresholds(scheduler: SchedulerMixin) -> bool:
    """Returns whether a scheduler uses dynamic thresholding."""
    # A config that was converted from another class keeps options of that class. This class may not support `thresholding`.
    supported = "thresholding" in inspect.signature(type(scheduler).__init__).parameters
    return bool(supported and scheduler.config.thresholding)


def clip_range(scheduler: SchedulerMixin) -> float | None:
    """Returns the largest magnitude to which the predicted x_0 is clipped with a scheduler. `None` means that it is not clipped."""
    config = scheduler.config
    # Schedulers without a clipping option clip too, because `clip_denoised` of the original code is on by default.
    clips = config.get("clip_sample", config.get("clip_denoised", True)) and not thresholds(scheduler)
    return config.get("clip_sample_range", 1.0) if clips else None
