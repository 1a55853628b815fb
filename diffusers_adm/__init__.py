"""ADM and classifier guidance (Dhariwal & Nichol 2021) for diffusers."""

from pathlib import Path

from .models import ADMUNet2DModel, NoisyClassifier
from .pipelines import ADMUpsamplePipeline, ClassifierGuidedPipeline


__version__ = "0.1.0"
__all__ = [
    "ADMUNet2DModel",
    "ADMUpsamplePipeline",
    "ClassifierGuidedPipeline",
    "NoisyClassifier",
    "default_cascade",
    "default_model",
]


def default_model() -> str:
    """Returns the folder of the pipeline that ships with this package. It draws digits of 32x32 pixels and was trained on MNIST."""
    return _shipped("adm-mnist-32")


def default_cascade() -> tuple[str, str]:
    """Returns the two folders of the cascade that ships with this package: digits of 16x16 pixels, and an upsampler to 32x32."""
    return _shipped("adm-mnist-16"), _shipped("adm-mnist-16-32-upsampler")


def _shipped(name: str) -> str:
    from . import model_cards

    return str(Path(model_cards.__path__[0]) / name)
