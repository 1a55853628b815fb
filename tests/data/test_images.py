"""Crops of images."""

import random

import numpy as np
from PIL import Image as PILImage

from diffusers_adm.data.images import center_crop, fit_image, random_crop, to_tensor
from diffusers_adm.data.options import ImageFormat


def test_crops_have_the_resolution_and_keep_the_content():
    rng = random.Random(0)
    image = PILImage.fromarray((np.indices((90, 130)).sum(0) % 256).astype(np.uint8))
    for resolution in (16, 33, 64, 90):
        assert center_crop(image, resolution).size == (resolution, resolution)
        assert random_crop(image, resolution, rng).size == (resolution, resolution)
    padded = to_tensor(fit_image(PILImage.new("L", (28, 28), 255), ImageFormat(32, crop="pad"), rng))
    assert padded.shape == (1, 32, 32)
    assert padded[0, 2:-2, 2:-2].eq(1).all() and padded.eq(-1).sum() == 32 * 32 - 28 * 28
    assert np.array_equal(np.asarray(center_crop(image, 90)), np.asarray(image)[:, 20:110])
    # A margin of three is divided as the published crop divides it: the smaller part first.
    assert np.array_equal(np.asarray(center_crop(image.crop((0, 0, 93, 90)), 90)), np.asarray(image)[:, 1:91])
