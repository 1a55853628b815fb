"""Pipelines for tools that know only what is in diffusers."""

import torch
from diffusers import DDPMPipeline

from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


def as_ddpm_pipeline(pipeline: ClassifierGuidedPipeline) -> DDPMPipeline:
    """
    Makes a `DDPMPipeline` of diffusers around the UNet of a pipeline, without classifier and without learned variance.

    What its `save_pretrained` writes holds no code. `DiffusionPipeline.from_pretrained` loads it wherever `diffusers_adm` has
    been imported, and needs no `trust_remote_code`. Of `UNet2DModel` it has `config.in_channels` and `config.sample_size`.

    Args:
        pipeline: Pipeline of an unconditional UNet that predicts the noise or x_0, with a scheduler whose config `DDPMScheduler`
            takes. Its weights are shared.

    Raises:
        ValueError: If the UNet needs class labels, or is told noise levels.
    """
    unet = pipeline.unet
    if unet.config.num_class_embeds is not None and unet.null_class is None:
        raise ValueError("A DDPMPipeline passes no class labels, which this UNet needs: take an unconditional UNet.")
    if unet.config.preconditioning is not None:
        raise ValueError(
            f"A DDPMPipeline tells timesteps, but this UNet is told noise levels (preconditioning={unet.config.preconditioning!r})."
        )
    channels = unet.config.in_channels
    with torch.device("meta"):
        plain = ADMUNet2DModel.from_config(unet.config, out_channels=channels)
    tensors = unet.state_dict()
    tensors |= {name: tensors[name][:channels] for name in ("conv_out.weight", "conv_out.bias")}
    plain.load_state_dict(tensors, assign=True)
    scheduler_config = {**pipeline.scheduler.config}
    if scheduler_config.get("variance_type") in ("learned", "learned_range"):
        scheduler_config["variance_type"] = "fixed_large"
    return DDPMPipeline(plain.eval(), pipeline.scheduler.from_config(scheduler_config))
