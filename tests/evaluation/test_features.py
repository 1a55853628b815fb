"""Features of Inception equal those of the published evaluator, and code in files of weights is not run."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from image_files import random_images
from torch_fidelity import FeatureExtractorInceptionV3

from diffusers_adm.evaluation import (
    FeatureExtractor,
)
from diffusers_adm.evaluation.feature_options import INCEPTION
from diffusers_adm.evaluation.features import spatial_features


def test_spatial_features_run_over_rows_then_columns_then_seven_channels():
    row, column, channel = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(9), indexing="ij")
    maps = (100 * row + 10 * column + channel).permute(2, 0, 1)[None]  # (1, 9, 3, 2)
    expected = [100 * r + 10 * c + k for r in range(3) for c in range(2) for k in range(7)]
    assert spatial_features(maps).tolist() == [expected]


class BlankInception(FeatureExtractorInceptionV3):
    """Extractor without weights."""

    def load_state_dict(self, state_dict):
        pass


def test_inception_gives_the_features_of_the_published_evaluator(tmp_path):
    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    blank = BlankInception(INCEPTION, ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(blank.state_dict(), tmp_path / "inception.pth")
    extractor = FeatureExtractor(INCEPTION, tmp_path / "inception.pth")
    seen = []
    extractor.network.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    grey = random_images(2)
    features = extractor(grey)
    assert features.pooled.shape == (2, 2048) and features.logits.shape == (2, 1008)
    maps = extractor.network.Mixed_6d.branch1x1(seen[0])  # (2, 192, 17, 17)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    for y, x, channel in ((0, 0, 6), (3, 16, 0), (16, 5, 2)):
        assert torch.equal(features.spatial[:, (17 * y + x) * 7 + channel], maps[:, channel, y, x])
    torch.testing.assert_close(features.logits, features.pooled @ extractor.network.fc.weight.T)  # without the bias
    torch.testing.assert_close(extractor(grey.repeat(3, axis=3)).pooled, features.pooled)


def test_weights_are_loaded_without_running_what_is_in_their_file(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    torch.save({"weight": Harmful()}, tmp_path / "zipped.pth")
    for name in ("weights.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=INCEPTION):
            FeatureExtractor(INCEPTION, tmp_path / name)
    assert not (tmp_path / "harmed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
