"""ADM and classifier guidance (Dhariwal & Nichol 2021) for diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING

from .lazy_modules import defer_module, lazy_attributes
from .shipped import DEFAULT_MODEL, shipped_folder


if TYPE_CHECKING:
    from .models import ADMUNet2DModel, NoisyClassifier
    from .pipelines import ADMUpsamplePipeline, ClassifierGuidedPipeline


__version__ = "0.1.0"
__all__ = [
    "ADMUNet2DModel",
    "ADMUpsamplePipeline",
    "ClassifierGuidedPipeline",
    "NoisyClassifier",
    "default_cascade",
    "default_consistency_model",
    "default_model",
    "default_photo_consistency_model",
    "default_photo_model",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "ADMUNet2DModel": f"{__name__}.models",
        "ADMUpsamplePipeline": f"{__name__}.pipelines",
        "ClassifierGuidedPipeline": f"{__name__}.pipelines",
        "NoisyClassifier": f"{__name__}.models",
    },
)
# diffusers looks for the classes of a saved pipeline in modules that have been imported: those that the pipeline's index names.
for _name in ("noisy_classifier", "unet_adm"):
    defer_module(f"{__name__}.models.{_name}", Path(__file__).parent / "models" / f"{_name}.py")


def default_model() -> str:
    """Returns the folder of the default pipeline, which ships with this package. It draws digits of 32x32 pixels and was trained on MNIST."""
    return shipped_folder(DEFAULT_MODEL)


def default_photo_model() -> str:
    """
    Returns the folder of the pipeline of photographs that ships with this package. It draws the ten classes of CIFAR-10 at 32x32
    pixels.
    """
    return shipped_folder("adm-cifar-32")


def default_cascade() -> tuple[str, str]:
    """Returns the two folders of the cascade that ships with this package: digits of 16x16 pixels, and an upsampler to 32x32."""
    return shipped_folder("adm-mnist-16"), shipped_folder("adm-mnist-16-32-upsampler")


def default_consistency_model() -> str:
    """
    Returns the folder of the consistency model that ships with this package. It draws the digits of the default model in one or two
    steps, without a classifier.
    """
    return shipped_folder("cm-mnist-32")


def default_photo_consistency_model() -> str:
    """
    Returns the folder of the consistency model of photographs that ships with this package. It draws the photographs of
    `default_photo_model()` in one or two steps, without a classifier.
    """
    return shipped_folder("cm-cifar-32")
