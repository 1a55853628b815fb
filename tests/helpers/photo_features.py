"""Registers the features of the independent classifier of small photographs with torch-fidelity: `--register
tests/helpers/photo_features.py --feature_extractor cifar-photos`. Images have 32x32 pixels and the classes of CIFAR-10. Its weights lie
beside it. It is right for 92.30 % of the 10,000 images of the test split.
"""

from judge_features import JudgeFeatures
from photo_classifier import load_photo_classifier
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY


NAME = "cifar-photos"


class PhotoFeatures(JudgeFeatures):
    """The classifier of photographs."""

    name, channels = NAME, 3
    build = staticmethod(load_photo_classifier)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, PhotoFeatures)
