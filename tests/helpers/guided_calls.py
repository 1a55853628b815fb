"""Calls of a tiny pipeline whose UNet has a null class."""

import torch
from diffusers import DDPMScheduler
from tiny_models import NUM_CLASSES, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.diffusion import NoiseSchedule, x_0_from_epsilon


LABELS = [1, 3]
NULL = NUM_CLASSES


def draw(pipeline, class_labels=LABELS, **call) -> torch.Tensor:
    arguments = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent", **call}
    return pipeline(class_labels, generator=torch.Generator().manual_seed(0), **arguments).images


def pipeline_of(scheduler_class: type = DDPMScheduler, **changes):
    """Builds a pipeline of a UNet with a null class."""
    unet = tiny_unet(use_null_class=True)
    return tiny_pipeline(unet, tiny_scheduler(scheduler_class, **changes))


def calls_of(module: torch.nn.Module) -> list[int]:
    """A list that collects the batch size of every call of a model."""
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def one_step_x_0(pipeline, x_t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
    """Returns the image that a single DDIM step from timestep 0 gives."""
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, [0])
    return x_0_from_epsilon(schedule, x_t, 0, epsilon)
