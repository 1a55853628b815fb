"""Files of published checkpoints."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags


@pytest.fixture
def pipeline_files(tmp_path):
    """Files of a UNet and a classifier, and the flags of both."""
    unet, classifier = load_case("unet_class_conditional")[0], load_case("classifier_attention")[0]
    torch.save(draw_weights(unet), tmp_path / "unet.pt")
    torch.save(draw_weights(classifier), tmp_path / "classifier.pt")
    return tmp_path / "unet.pt", tmp_path / "classifier.pt", f"{published_flags(unet)} {published_flags(classifier)}"
