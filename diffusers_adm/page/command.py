"""`diffusers-adm page`."""

import argparse
from dataclasses import dataclass

from diffusers_adm.evaluation.options import ModelOptions
from diffusers_adm.options import add_examples, add_options, build_options, in_range, option, option_values


@dataclass(frozen=True)
class PageOptions:
    """Address to serve the page at."""

    host: str = option("127.0.0.1", metavar="HOST", help="Address to listen at. 0.0.0.0 serves other machines too.")
    port: int | None = option(
        None, help="Port to listen at.", unset="the first free one from 7860", check=in_range(1, 65535)
    )


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `page`."""
    add_options(parser, PageOptions, title="address")
    add_options(parser, ModelOptions, title="model")
    add_examples(
        parser,
        "diffusers-adm page",
        "diffusers-adm page --model released:imagenet-64 --host 0.0.0.0 --port 8000",
    )


def serve_page(args: argparse.Namespace) -> None:
    """
    Serves the page until it is interrupted.

    Raises:
        ModuleNotFoundError: If the extra `page` is not installed.
        ValueError: If the model is no pipeline that the page can run.
        OSError: If the model does not exist, or no page can be served at the address.
    """
    options, model = build_options(PageOptions, args), build_options(ModelOptions, args)

    from diffusers_adm.evaluation.sampling import load_pipeline
    from diffusers_adm.launch import join_processes
    from diffusers_adm.page.model import PageModel
    from diffusers_adm.page.page import build_page, launch_page

    loading = option_values(model)
    page = build_page(PageModel(load_pipeline(**loading, device=join_processes().device), **loading))
    try:
        launch_page(page, options.host, options.port, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        place = "No free port was found" if options.port is None else f"--port {options.port} cannot be used"
        raise OSError(f"{place} at --host {options.host}: choose another --port or --host.") from error
    print(f"The page is at {page.local_url} (Ctrl+C stops it).", flush=True)
    page.block_thread()
