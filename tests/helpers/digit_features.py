"""Registers the features of the independent digit classifier with torch-fidelity: `--register tests/helpers/digit_features.py
--feature_extractor mnist-digits`. Images are digits of 32x32 pixels.

`pooled` are the 64 numbers before its last layer, `spatial` the first seven channels after its second stage (8x8 pixels).
"""

import torch
from digit_classifier import load_digit_classifier
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffusers_adm.evaluation.features import spatial_features


NAME = "mnist-digits"


class DigitFeatures(FeatureExtractorBase):
    """The classifier as torch-fidelity runs extractors; its weights lie beside it."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.classifier = load_digit_classifier()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits", "spatial")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.shape[2:] != (32, 32):
            raise ValueError(f"{NAME} takes digits of 32x32 pixels, not {tuple(images.shape[2:])}.")
        maps = self.classifier.stages[:2](images[:, :1].float() / 127.5 - 1)  # (images, 32, 8, 8)
        pooled = self.classifier.stages[2](maps).mean(dim=(2, 3))  # (images, 64)
        found = {"pooled": pooled, "logits": self.classifier.head(pooled), "spatial": spatial_features(maps)}
        return tuple(found[name] for name in self.features_list)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, DigitFeatures)
