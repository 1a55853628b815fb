"""ADM and classifier guidance (Dhariwal & Nichol 2021) for diffusers."""

from pathlib import Path

from .models import ADMUNet2DModel, NoisyClassifier
from .pipelines import ADMUpsamplePipeline, ClassifierGuidedPipeline


def default_model() -> str:
    """Folder of the pipeline that ships with this package: digits of 32x32 pixels, trained on MNIST."""
    from . import model_cards

    return str(Path(model_cards.__path__[0]) / "adm-mnist-32")
