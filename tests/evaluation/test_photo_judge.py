"""The judge of photographs: its features, and its accuracy where the folder CIFAR10 holds the test split."""

import os

import numpy as np
import pytest
import torch
from digit_classifier import accuracy
from photo_classifier import load_photo_classifier, load_photos
from photo_features import NAME as PHOTOS

from diffusers_adm.evaluation import FeatureExtractor


CIFAR10 = os.environ.get("CIFAR10")


def test_features_and_logits_are_those_of_the_classifier():
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found = FeatureExtractor(PHOTOS)(images)
    classifier, pixels = load_photo_classifier(), torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, classifier.features(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logits, classifier(pixels), rtol=1e-4, atol=1e-4)
    assert found.pooled.shape == (4, 256) and found.logits.shape == (4, 10)


@pytest.mark.skipif(CIFAR10 is None, reason="CIFAR10 names no folder of CIFAR-10")
def test_judge_is_right_for_92_of_100_photographs():
    assert accuracy(load_photo_classifier(), *load_photos(CIFAR10, "test")) >= 0.92
