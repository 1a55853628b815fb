"""One page for the tests of this folder, which are collected only where the extra `page` is installed."""

import importlib.util
from collections.abc import Iterator

import pytest

from diffusers_adm import ClassifierGuidedPipeline, default_model


collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("gradio") is None else []


@pytest.fixture(scope="session")
def pipeline() -> ClassifierGuidedPipeline:
    """The default model, for direct calls."""
    loaded = ClassifierGuidedPipeline.from_pretrained(default_model())
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def page_url() -> Iterator[str]:
    """The address of a page of the default model, which shares nothing with `pipeline`."""
    from diffusers_adm.evaluation.sampling import load_pipeline
    from diffusers_adm.page.model import PageModel
    from diffusers_adm.page.page import build_page, launch_page

    page = build_page(PageModel(load_pipeline(None)))
    launch_page(page, "127.0.0.1", quiet=True, prevent_thread_lock=True)
    yield page.local_url.rstrip("/")
    page.close()
