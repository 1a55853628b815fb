"""Files of published checkpoints, and a server of them."""

import huggingface_hub
import pytest
import torch
from file_server import FileServer
from golden_cases import draw_weights, load_case, published_flags
from tiny_released import CLASSIFIER, UNET, add

from diffusers_adm.openai.released import RELEASED_BY_NAME


@pytest.fixture
def pipeline_files(tmp_path):
    """Files of a UNet and a classifier, and the flags of both."""
    unet, classifier = load_case("unet_class_conditional")[0], load_case("classifier_attention")[0]
    torch.save(draw_weights(unet), tmp_path / "unet.pt")
    torch.save(draw_weights(classifier), tmp_path / "classifier.pt")
    return tmp_path / "unet.pt", tmp_path / "classifier.pt", f"{published_flags(unet)} {published_flags(classifier)}"


@pytest.fixture
def server(monkeypatch):
    """Server of a small UNet and its classifier, which are in the table as `tiny` and `tiny-classifier`."""
    server = FileServer({"unet.pt": UNET, "classifier.pt": CLASSIFIER})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("diffusers_adm.hub.resumed_download.time.sleep", lambda seconds: None)
    names = list(RELEASED_BY_NAME)
    add("tiny-classifier", server, "classifier_attention", "classifier.pt", "classifier")
    add("tiny", server, guided_by="tiny-classifier", guidance_scale=2.0)
    yield server
    server.shutdown()
    for name in RELEASED_BY_NAME.keys() - names:
        del RELEASED_BY_NAME[name]
