"""Features of the independent classifiers, for torch-fidelity."""

import torch
from torch_fidelity import FeatureExtractorBase

from diffusers_adm.evaluation.features import spatial_features


class JudgeFeatures(FeatureExtractorBase):
    """
    A classifier of images of 32x32 pixels as torch-fidelity runs extractors.

    `pooled` are the numbers before its last layer, `spatial` the first seven channels after its second stage (8x8 pixels). Subclasses
    set `name`, `channels` and `build`, which returns the classifier.
    """

    name: str
    channels: int

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.classifier = self.build()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits", "spatial")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if images.shape[2:] != (32, 32):
            raise ValueError(f"{self.name} takes images of 32x32 pixels, not {tuple(images.shape[2:])}.")
        maps = self.classifier.maps(images[:, : self.channels].float() / 127.5 - 1)  # (images, channels, 8, 8)
        pooled = self.classifier.pooled(maps)  # (images, features)
        found = {"pooled": pooled, "logits": self.classifier.head(pooled), "spatial": spatial_features(maps)}
        return tuple(found[name] for name in self.features_list)
