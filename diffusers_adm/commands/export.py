"""`diffusers-adm export`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.choices import EXPORT_FILES
from diffusers_adm.options import add_examples, add_options, build_options, option


@dataclass(frozen=True)
class ExportOptions:
    """Network to export, and folder to write."""

    output: Path = option(metavar="DIR", help="Folder to write. It must be new or empty.")
    model: str | None = option(
        None,
        metavar="MODEL",
        help="Folder or Hub id of a pipeline or network, shipped:NAME of a pipeline that ships with this package, or released:NAME of a"
        " released checkpoint.",
        unset="the pipeline of digits that ships with this package",
    )
    subfolder: str | None = option(
        None, choices=("unet", "classifier"), help="Network of a pipeline.", unset="the UNet"
    )
    revision: str | None = option(None, metavar="NAME", help="Branch, tag or commit on the Hub.", unset="main")
    variant: str | None = option(None, metavar="NAME", help="Variant of the weight files, such as fp16.")
    format: str = option(
        "onnx", choices=tuple(EXPORT_FILES), help="Kind of file: model.onnx, or model.pt2 of torch.export."
    )
    check: bool = option(
        True, help="Run the file on random images, and compare its outputs with those of the network."
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export`."""
    add_options(parser, ExportOptions, title="export")
    add_examples(
        parser,
        "diffusers-adm export --output digits-onnx",
        "diffusers-adm export --model runs/unet/pipeline --format torch-export --output exported/unet",
    )


def export(args: argparse.Namespace) -> None:
    """
    Exports one network, and prints the file and how far it differs from the network.

    Raises:
        ValueError: If the network cannot be loaded or exported, or the folder is in use.
        OSError: If a file cannot be read or written.
        ModuleNotFoundError: If a package that the format needs is not installed.
    """
    options = build_options(ExportOptions, args)

    from diffusers_adm.export.networks import check_can_export, export_network
    from diffusers_adm.export.sources import load_network

    check_can_export(options.format, options.output)
    network = load_network(options.model, options.subfolder, options.revision, options.variant)
    difference = export_network(network, options.output, options.format, options.check)
    print(f"Wrote {type(network).__name__} to {options.output.resolve() / EXPORT_FILES[options.format]}")
    if difference is not None:
        print(f"Its outputs differ from those of the network by {difference:.1e} at most.")
