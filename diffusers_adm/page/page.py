"""The page, and its launch."""

import gradio as gr

from diffusers_adm.page.about import build_about
from diffusers_adm.page.charts import CHART_CSS
from diffusers_adm.page.compare import build_compare
from diffusers_adm.page.edit import build_edit
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.path import build_path
from diffusers_adm.page.play import build_play
from diffusers_adm.page.tradeoff import build_tradeoff


TABS = {
    "Play": build_play,
    "Trade-off": build_tradeoff,
    "Path": build_path,
    "Edit": build_edit,
    "Compare": build_compare,
    "About": build_about,
}

# System fonts, because other fonts would be downloaded from another server.
THEME = gr.themes.Default(
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)
# Small images are shown with sharp pixels, below the label of their frame.
CSS = """
.pixelated img { image-rendering: pixelated; padding-top: 1.75rem; }
.pixelated .grid-wrap img { padding-top: 0; }
.pixelated .grid-container { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) !important; }
"""
MAX_UPLOAD = 5 * 10**6  # bytes
MAX_REQUEST = 6 * 10**6
MAX_WAITING = 32  # runs in the queue
HOUR = 3600


def build_page(model: PageModel) -> gr.Blocks:
    """
    Builds the page.

    Args:
        model: Model that all users share.
    """
    with gr.Blocks(title="Classifier guidance", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown("# Classifier guidance\nWhat a classifier's gradient does to the images of a diffusion model.")
        for name, build in TABS.items():
            with gr.Tab(name):
                build(model)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def launch_page(page: gr.Blocks, host: str | None = None, port: int | None = None, **options) -> None:
    """
    Serves a page.

    Args:
        page: Page to serve.
        host: Address to listen at. `None` means that of the environment variable `GRADIO_SERVER_NAME`, or 127.0.0.1.
        port: Port to listen at. `None` means that of `GRADIO_SERVER_PORT`, or the first free one from 7860.
        options: Further arguments of `gr.Blocks.launch`.

    Raises:
        OSError: If the port is in use, or no port is free.
    """
    page.launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css=CSS + CHART_CSS,
        max_file_size=MAX_UPLOAD,
        app_kwargs={"max_body_size": MAX_REQUEST},
        share=False,
        show_error=False,
        ssr_mode=False,
        footer_links=["api"],
        **options,
    )
