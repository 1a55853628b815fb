"""Registers the features of the independent digit classifier with torch-fidelity: `--register tests/helpers/digit_features.py
--feature_extractor mnist-digits`. Images are digits of 32x32 pixels. Its weights lie beside it.
"""

from digit_classifier import load_digit_classifier
from judge_features import JudgeFeatures
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY


NAME = "mnist-digits"


class DigitFeatures(JudgeFeatures):
    """The classifier of digits."""

    name, channels = NAME, 1
    build = staticmethod(load_digit_classifier)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, DigitFeatures)
