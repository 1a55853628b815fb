"""Models small enough to run in milliseconds, with random weights.

A fresh model's output layers are zero, and a comparison of zeros always holds: every parameter is drawn anew.
"""

import torch
from diffusers import DDPMScheduler, PNDMScheduler

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier


NUM_CLASSES = 5
SIZE = 8


def draw_parameters(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values: weights of unit gain, norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if value.ndim >= 2:
                value = value / value[0].numel() ** 0.5
            else:
                value = 0.1 * value + float(name.endswith("weight"))
            parameter.copy_(value)
    return model.eval()


def tiny_unet(seed: int = 0, **changes) -> ADMUNet2DModel:
    """Two levels, attention at the lower one, learned variance, five classes."""
    config = {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "num_class_embeds": NUM_CLASSES,
        "dropout": 0.0,
    }
    return draw_parameters(ADMUNet2DModel(**{**config, **changes}), seed)


def tiny_classifier(pool: str = "attention", seed: int = 1, **changes) -> NoisyClassifier:
    """The same encoder, and a pooling."""
    config = {
        "sample_size": SIZE,
        "in_channels": 3,
        "num_classes": NUM_CLASSES,
        "pool": pool,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return draw_parameters(NoisyClassifier(**{**config, **changes}), seed)


def tiny_scheduler(scheduler_class: type = DDPMScheduler, **changes):
    """The published schedule with 1000 timesteps; DDPM learns its variance."""
    config = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    if scheduler_class is DDPMScheduler:
        config["variance_type"] = "learned_range"
    if scheduler_class is PNDMScheduler:  # the rest is refused
        config["skip_prk_steps"] = True
    return scheduler_class(**{**config, **changes})


def tiny_pipeline(
    unet: ADMUNet2DModel | None = None,
    scheduler=None,
    classifier: NoisyClassifier | None = None,
    with_classifier: bool = True,
    **changes,
) -> ClassifierGuidedPipeline:
    """A quiet pipeline of the tiny models; `with_classifier=False` leaves the classifier out."""
    if classifier is None and with_classifier:
        classifier = tiny_classifier()
    pipeline = ClassifierGuidedPipeline(
        unet=tiny_unet() if unet is None else unet,
        scheduler=tiny_scheduler() if scheduler is None else scheduler,
        classifier=classifier,
        **changes,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(batch: int = 2, channels: int = 3, height: int = SIZE, width: int = SIZE, seed: int = 2) -> torch.Tensor:
    """Noise of an image's shape."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
