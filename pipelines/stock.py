"""Pipelines of diffusers itself, for tools that support only its classes."""

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.models.adapters import without_adapters
from diffusers_adm.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from diffusers_adm.solvers import full_config


def as_ddpm_pipeline(pipeline: ClassifierGuidedPipeline) -> DDPMPipeline:
    """
    Builds a `DDPMPipeline` of diffusers with the UNet of a pipeline, without classifier and without learned variance.

    When it is saved, its folder contains no code. `DiffusionPipeline.from_pretrained` loads it without `trust_remote_code` if
    `diffusers_adm` has been imported. The UNet has the entries `in_channels` and `sample_size` of `UNet2DModel` in its config.

    Args:
        pipeline: Pipeline of an unconditional UNet that predicts the noise or x_0. The new pipeline shares its weights. If the UNet has
            adapters, they are merged into a copy. The new scheduler is of the same class if that is `DDPMScheduler` or
            `DDIMScheduler`, otherwise a `DDPMScheduler` with the same betas.

    Raises:
        ValueError: If the UNet requires class labels, or is given noise levels.
    """
    unet = pipeline.unet
    if unet.config.num_class_embeds is not None and unet.null_class is None:
        raise ValueError(
            "The UNet must be unconditional or have a null class, because a DDPMPipeline passes no class labels."
        )
    if unet.config.preconditioning is not None:
        raise ValueError(
            "The UNet must be given timesteps, as a DDPMPipeline passes, but this UNet is given noise levels"
            f" (preconditioning={unet.config.preconditioning!r})."
        )
    channels = unet.config.in_channels
    with torch.device("meta"):
        plain = ADMUNet2DModel.from_config(unet.config, out_channels=channels)
    tensors = without_adapters(unet).state_dict()
    tensors |= {name: tensors[name][:channels] for name in ("conv_out.weight", "conv_out.bias")}
    plain.load_state_dict(tensors, assign=True)
    scheduler_config = full_config(pipeline.scheduler)
    if scheduler_config.get("variance_type") in ("learned", "learned_range"):
        scheduler_config["variance_type"] = "fixed_large"
    scheduler_class = type(pipeline.scheduler)
    if scheduler_class not in (DDPMScheduler, DDIMScheduler):
        scheduler_class = DDPMScheduler  # a DDPMPipeline passes a generator, which the steps of others do not take
    return DDPMPipeline(plain.eval(), scheduler_class.from_config(scheduler_config))
