from .noisy_classifier import NoisyClassifier, NoisyClassifierOutput
from .unet_adm import ADMUNet2DModel, ADMUNet2DOutput


__all__ = ["ADMUNet2DModel", "ADMUNet2DOutput", "NoisyClassifier", "NoisyClassifierOutput"]
