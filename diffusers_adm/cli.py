"""The command line: `diffusers-adm <command>`.

The module of a command adds its options. It imports other modules only inside the function that runs the command. Therefore the help and
the errors of a command line need neither torch nor diffusers.
"""

import argparse
import importlib
import sys

from diffusers_adm import __version__
from diffusers_adm.command_line import CommandParser, launched_processes, run_command, suggest_nearest
from diffusers_adm.options import add_examples
from diffusers_adm.quiet import hide_bars_in_logs


GENERAL_OPTIONS = ("-h", "--help", "--version")
PARALLEL_COMMANDS = ("sample", "nll", "sweep", "ablate")  # those that several processes can share
# Module, function that adds the options, function that runs the command, and purpose of each command.
COMMANDS = {
    "convert": (
        "commands.convert",
        "add_convert_arguments",
        "convert",
        "convert checkpoints of the original code to a folder that diffusers loads",
    ),
    "released": (
        "commands.released",
        "add_released_arguments",
        "list_released",
        "list the released checkpoints, for --released and --model released:NAME",
    ),
    "demo": (
        "commands.demo",
        "add_demo_arguments",
        "demo",
        "draw a picture with a model that ships with this package",
    ),
    "inspect-data": (
        "commands.inspect_data",
        "add_inspection_arguments",
        "inspect_data",
        "print classes, counts, sizes and unreadable files of a dataset to train on",
    ),
    "export": (
        "commands.export",
        "add_export_arguments",
        "export",
        "write a UNet or a classifier as an ONNX file, or as a program of torch.export",
    ),
    "sample": (
        "evaluation.commands.sample",
        "add_sample_arguments",
        "sample",
        "draw many images on any number of processes, and continue an interrupted run",
    ),
    "evaluate": (
        "evaluation.commands.evaluate",
        "add_evaluate_arguments",
        "evaluate",
        "compare samples with a reference by FID, sFID, IS, precision and recall",
    ),
    "make-reference": (
        "evaluation.commands.make_reference",
        "add_reference_arguments",
        "make_reference",
        "compute the statistics of a dataset, for evaluate",
    ),
    "nll": (
        "evaluation.commands.nll",
        "add_likelihood_arguments",
        "nll",
        "compute the variational bound of a dataset in bits per dimension",
    ),
    "sweep": (
        "evaluation.commands.sweep",
        "add_sweep_arguments",
        "sweep",
        "compare guidance scales, steps and schedulers by the metrics of their samples",
    ),
    "ablate": (
        "ablation.command",
        "add_ablation_arguments",
        "ablate",
        "train variants with equal budgets, such as the paper's ablations, and compare their samples",
    ),
    "search-steps": (
        "evaluation.commands.search_steps",
        "add_search_arguments",
        "search_steps_command",
        "search for the best noise levels of few steps",
    ),
    "page": (
        "page.command",
        "add_page_arguments",
        "serve_page",
        "serve a page for the browser that shows the effect of guidance",
    ),
}


def build_parser(command_name: str | None = None) -> argparse.ArgumentParser:
    """
    Builds the parser of all commands. Each command sets `run` to its function.

    Args:
        command_name: Name of the command that will be parsed. Other commands have no options then. `None` means all options of all
            commands.
    """
    parser = CommandParser(
        prog="diffusers-adm",
        description="ADM and classifier guidance for diffusers. `diffusers-adm COMMAND --help` shows the options of a command.",
    )
    add_examples(
        parser,
        "diffusers-adm demo --output demo.png",
        "diffusers-adm convert --released imagenet-64 --output adm-64x64",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (module, add_arguments, function, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if command_name in (None, name):
            implementation = importlib.import_module(f"diffusers_adm.{module}")
            getattr(implementation, add_arguments)(command)
            command.set_defaults(run=getattr(implementation, function))
    return parser


def _check_first_word(parser: argparse.ArgumentParser, word: str) -> None:
    """Reports a misspelt command, or a misspelt option before it, which `argparse` would report as a missing command."""
    kind, known = ("option", GENERAL_OPTIONS) if word.startswith("-") else ("command", tuple(COMMANDS))
    if word and word not in known:
        parser.error(f"there is no {kind} {word}{suggest_nearest(word, known)}")


def _check_processes(parser: argparse.ArgumentParser, name: str) -> None:
    """Reports a launch of several processes of a command that would do the same work in each."""
    processes = launched_processes()
    if processes > 1 and name in COMMANDS and name not in PARALLEL_COMMANDS:
        parser.error(
            f"{name} runs in one process, but {processes} were launched. Start it without torchrun or accelerate launch"
        )


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv: Words of the command line. `None` means those of the process.

    Returns:
        Exit code: 0, 2 if the input is invalid or a file cannot be written, or 130 if the command was interrupted.
    """
    if argv is None:
        hide_bars_in_logs()
        argv = sys.argv[1:]
    name = argv[0] if argv else ""

    def run() -> None:
        parser = build_parser(name)
        _check_first_word(parser, name)
        _check_processes(parser, name)
        args = parser.parse_args(argv)
        args.run(args)

    return run_command(f"diffusers-adm {name}".rstrip(), run)


if __name__ == "__main__":
    sys.exit(main())
