"""The command line: `diffusers-adm <command>`."""

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier, __version__
from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.demo import draw_cascade_demo, draw_demo
from diffusers_adm.hub.cards import released_card
from diffusers_adm.hub.released_files import save_converted
from diffusers_adm.hub.saved_files import check_variant
from diffusers_adm.models.weights import cast_weights
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.released import RELEASED_BY_NAME, find_released, guiding_classifier, released_checkpoint
from diffusers_adm.options import add_options, at_least, build_options, in_range, option
from diffusers_adm.pipelines.released import load_released


DTYPES = ("float32", "float16", "bfloat16")

CONVERT_EXAMPLES = """examples:
  diffusers-adm convert --released imagenet-64 --output adm-64x64
  diffusers-adm convert --unet 64x64_diffusion.pt --classifier 64x64_classifier.pt --output adm-64x64
  diffusers-adm convert --unet my_unet.pt --flags="--image_size 64 --num_channels 128" --dtype float16 --output my-model
"""
DEMO_EXAMPLES = """examples:
  diffusers-adm demo --output demo.png
  diffusers-adm demo --cascade --steps 50 --output cascade.png
"""

# Commands that are imported when they are run: module, function that adds their options, function that runs them.
LAZY_COMMANDS = {
    "inspect-data": (
        "training.inspection",
        "add_inspection_arguments",
        "inspect_data",
        "print classes, counts, sizes and unreadable files of a dataset to train on",
    ),
    "sample": (
        "evaluation.commands.sample",
        "add_sample_arguments",
        "sample",
        "draw many images, on any number of processes; a run that was stopped goes on",
    ),
    "evaluate": (
        "evaluation.commands.evaluate",
        "add_evaluate_arguments",
        "evaluate",
        "FID, sFID, IS, precision and recall of samples against a reference",
    ),
    "make-reference": (
        "evaluation.commands.make_reference",
        "add_reference_arguments",
        "make_reference",
        "statistics of a dataset, for evaluate",
    ),
    "nll": (
        "evaluation.commands.nll",
        "add_likelihood_arguments",
        "nll",
        "variational bound of a dataset in bits per dimension",
    ),
    "sweep": (
        "evaluation.commands.sweep",
        "add_sweep_arguments",
        "sweep",
        "metrics of samples over guidance scales, steps, schedulers",
    ),
    "page": (
        "page.command",
        "add_page_arguments",
        "serve_page",
        "open a page that shows in a browser what guidance does",
    ),
}


@dataclass(frozen=True)
class ConvertOptions:
    """Checkpoints to convert, and the folder to write."""

    output: Path = option(metavar="DIR", help="Folder to write. It must be new or empty.")
    released: str | None = option(
        None,
        metavar="NAME",
        help="Released checkpoint to download and convert, with the classifier that guides it, instead of files.",
    )
    accept_license: bool = option(
        False, help="Accept the restrictions of the released checkpoint's license, where they must be accepted."
    )
    unet: Path | None = option(None, metavar="FILE", help="Checkpoint of a UNet or an upsampler.")
    classifier: Path | None = option(None, metavar="FILE", help="Checkpoint of a classifier.")
    flags: str | None = option(
        None,
        metavar="FLAGS",
        parse=str,
        help='Model flags of the original command line, as one string such as "--image_size 64 ...". Released files, which are'
        " recognised by name, need none.",
    )
    dtype: str | None = option(None, choices=DTYPES, help="Data type of the weights, instead of the stored one.")
    variant: str | None = option(
        None, metavar="NAME", help="Part of the weight files' names, such as fp16. None by default."
    )


def load_checkpoints(options: ConvertOptions) -> DiffusionPipeline | NoisyClassifier:
    """
    Loads the checkpoints of `convert`: as a pipeline, or as a model for a classifier without a UNet.

    Raises:
        ValueError: If the checkpoints cannot be converted.
    """
    if options.released is not None:
        return load_released(options.released, accept_license=options.accept_license)
    if options.unet is None:
        return NoisyClassifier.from_openai(options.classifier, options.flags)
    unet = PublishedCheckpoint(options.unet, options.flags)
    if options.classifier is None and unet.kind == "upsampler":
        return ADMUpsamplePipeline.from_openai(unet)
    return ClassifierGuidedPipeline.from_openai(unet, options.classifier)


def find_card(options: ConvertOptions) -> ModelCard | None:
    """Returns the card of released checkpoints. `None` for others, and for a conversion that changes or renames weights."""
    changed = options.flags is not None or options.dtype is not None or options.variant is not None
    if options.released is not None and not changed:
        return released_card(released_checkpoint(options.released))
    released = find_released(options.unet or options.classifier)
    classifier = find_released(options.classifier) if options.unet else None
    if changed or released is None or classifier is not guiding_classifier(released):
        return None
    return released_card(released)


def convert(args: argparse.Namespace) -> None:
    """
    Converts published checkpoints to a folder that `from_pretrained` loads.

    Raises:
        ValueError: If the folder is in use, the variant is no name, or the checkpoints cannot be converted.
        OSError: If the folder cannot be written.
    """
    options = build_options(ConvertOptions, args)
    check_variant(options.variant)
    if options.released is None and options.unet is None and options.classifier is None:
        raise ValueError("Nothing to convert: give --released, or --unet, --classifier or both.")
    given = [f"--{name}" for name in ("unet", "classifier", "flags") if getattr(options, name) is not None]
    if options.released is not None and given:
        raise ValueError(f"--released has files and flags of its own: leave out {', '.join(given)}.")
    output = options.output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {options.output} exists already and is not an empty folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        converted = load_checkpoints(options)
        if options.dtype is not None:
            models = converted.components.values() if isinstance(converted, DiffusionPipeline) else [converted]
            for model in models:
                if isinstance(model, torch.nn.Module):
                    cast_weights(model, getattr(torch, options.dtype))
        save_converted(converted, unfinished, variant=options.variant)
        if (card := find_card(options)) is not None:
            card.save(unfinished / "README.md")
    print(f"Wrote {type(converted).__name__} to {output}")


def add_convert_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    add_options(command, ConvertOptions)
    command.set_defaults(run=convert)


def list_released(args: argparse.Namespace) -> None:
    """Prints a table of the released checkpoints."""
    rows = [("name", "model", "pixels", "classes", "size", "license", "what it is")]
    for released in RELEASED_BY_NAME.values():
        remarks = [f"trained on {released.trained_on}"]
        remarks += [f"guided by {released.guided_by}"] if released.guided_by else []
        remarks += [released.note] if released.note else []
        remarks += [f"cannot be converted, because {released.unsupported}"] if released.unsupported else []
        license = released.license if released.terms is None else f"{released.license}, {released.terms}"
        classes = "1000" if released.imagenet_labels else "none"
        size = "?" if released.size is None else f"{released.size / 1e9:.1f} GB"
        rows.append((released.name, released.kind, released.resolution, classes, size, license, "; ".join(remarks)))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        print(*(str(cell).ljust(width) for cell, width in zip(cells, widths)), last, sep="  ")


@dataclass(frozen=True)
class DemoOptions:
    """Picture to draw."""

    cascade: bool = option(False, help="Draw small digits, and enlarge them.")
    output: Path = option(Path("demo.png"), metavar="FILE", help="Picture to write.")
    steps: int = option(25, help="Number of DDIM steps.", check=at_least(1))
    seed: int = option(0, help="Seed of the first column.", check=in_range(0, 2**32))


def demo(args: argparse.Namespace) -> None:
    """Draws the picture of the default model, or of the default cascade."""
    options = build_options(DemoOptions, args)
    draw = draw_cascade_demo if options.cascade else draw_demo
    draw(options.output, options.steps, options.seed)


def add_demo_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `demo`."""
    add_options(command, DemoOptions)
    command.set_defaults(run=demo)


def add_command(commands, name: str, purpose: str, examples: str = "") -> argparse.ArgumentParser:
    """Adds the parser of one command, whose help ends with examples."""
    return commands.add_parser(
        name,
        help=purpose,
        description=purpose,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def build_parser(command_name: str | None = None) -> argparse.ArgumentParser:
    """
    Builds the parser of all commands. Each command sets `run` to its function.

    Args:
        command_name: Name of the command that will be parsed. The options of other commands that are imported when they are run
            are left out.
    """
    parser = CommandParser(prog="diffusers-adm", description="ADM and classifier guidance for diffusers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_convert_arguments(
        add_command(
            commands,
            "convert",
            "convert checkpoints of the original code to a folder that diffusers loads",
            CONVERT_EXAMPLES,
        )
    )
    add_command(
        commands, "released", "list the released checkpoints, for --released and --model released:NAME"
    ).set_defaults(run=list_released)
    add_demo_arguments(
        add_command(commands, "demo", "draw digits with the default model, guided and unguided", DEMO_EXAMPLES)
    )
    for name, (module, add_arguments, function, purpose) in LAZY_COMMANDS.items():
        command = add_command(commands, name, purpose)
        if name == command_name:
            implementation = importlib.import_module(f"diffusers_adm.{module}")
            getattr(implementation, add_arguments)(command)
            command.set_defaults(run=getattr(implementation, function))
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv: Words of the command line. `None` means those of the process.

    Returns:
        Exit code: 0, 2 if the input is invalid or a file cannot be written, or 130 if the command was interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else None

    def run() -> None:
        args = build_parser(name).parse_args(argv)
        args.run(args)

    return run_command(f"diffusers-adm {name}", run)


if __name__ == "__main__":
    sys.exit(main())
