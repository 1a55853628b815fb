"""Saved pipelines and a Hub."""

import pytest
from hub_server import HubServer
from tiny_models import tiny_pipeline


@pytest.fixture
def saved(tmp_path):
    """A pipeline, and the folder where it was saved."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    return pipeline, tmp_path / "saved"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and the environment in which a client asks it."""
    server = HubServer()
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    yield server, environment
    server.shutdown()
