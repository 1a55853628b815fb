"""The command line: `diffusers-adm <command>`."""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.demo import draw_cascade_demo, draw_demo
from diffusers_adm.hub.bundle import save_model
from diffusers_adm.hub.cards import released_card
from diffusers_adm.openai.checkpoints import is_upsampler
from diffusers_adm.openai.flags import released_preset
from diffusers_adm.openai.released import guiding_classifier


DTYPES = ("float32", "float16", "bfloat16")

# Commands that need packages of an extra: module, function that adds their options, function that runs them.
EXTRA_COMMANDS = {
    "inspect-data": (
        "training.inspection",
        "add_inspection_arguments",
        "inspect_data",
        "print classes, counts, sizes and unreadable files of a dataset to train on",
    ),
    "sample": (
        "evaluation.sampling",
        "add_sample_arguments",
        "sample",
        "draw many images, on any number of processes; a run that was stopped goes on",
    ),
    "evaluate": (
        "evaluation.metrics",
        "add_evaluate_arguments",
        "evaluate",
        "FID, sFID, IS, precision and recall of samples against a reference",
    ),
    "make-reference": (
        "evaluation.reference",
        "add_reference_arguments",
        "make_reference",
        "statistics of a dataset, for evaluate",
    ),
    "nll": (
        "evaluation.likelihood",
        "add_likelihood_arguments",
        "measure_likelihood",
        "variational bound of a dataset in bits a dimension",
    ),
    "sweep": (
        "evaluation.sweep",
        "add_sweep_arguments",
        "sweep",
        "metrics of samples over guidance scales, steps, schedulers",
    ),
}


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """
    Casts one weight after the other. Narrower ones take the place of the old, so that a large checkpoint needs no more
    memory than its own; of a file that is mapped into memory this changes the process's own pages only.
    """
    for parameter in model.parameters():
        old = parameter.data
        parameter.data = old.to(dtype)
        if parameter.element_size() < old.element_size():
            place = old.flatten().view(dtype)[: old.numel()].view(old.shape)
            parameter.data = place.copy_(parameter.data)


def convert(args: argparse.Namespace) -> None:
    """
    Converts published checkpoints to a folder that `from_pretrained` loads: a pipeline, or the model where a classifier
    comes alone.

    Raises:
        ValueError: If the folder is in use, or the checkpoints cannot be converted.
    """
    if args.unet is None and args.classifier is None:
        raise ValueError("Nothing to convert: give --unet, --classifier or both.")
    output = Path(args.output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {args.output} exists already and is not an empty folder.")

    if args.unet is None:
        converted = NoisyClassifier.from_openai(args.classifier, args.flags)
    elif args.classifier is None and is_upsampler(args.unet, args.flags):
        converted = ADMUpsamplePipeline.from_openai(args.unet, args.flags)
    else:
        converted = ClassifierGuidedPipeline.from_openai(args.unet, args.classifier, args.flags)
    if args.dtype is not None:
        models = converted.components.values() if isinstance(converted, DiffusionPipeline) else [converted]
        for model in models:
            if isinstance(model, torch.nn.Module):
                cast_weights(model, getattr(torch, args.dtype))

    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as unfinished:
        if isinstance(converted, DiffusionPipeline):
            converted.save_pretrained(unfinished, variant=args.variant)
        else:
            save_model(converted, unfinished, variant=args.variant)
        preset = released_preset(args.unet or args.classifier)
        classifier = released_preset(args.classifier) if args.unet else None
        as_published = args.flags is None and args.dtype is None and args.variant is None
        if preset is not None and as_published and classifier is guiding_classifier(preset):
            released_card(preset).save(unfinished / "README.md")
    print(f"Wrote {type(converted).__name__} to {output}")


def demo(args: argparse.Namespace) -> None:
    """Draws the picture of the default model, or of the default cascade."""
    draw = draw_cascade_demo if args.cascade else draw_demo
    draw(args.output, args.steps, args.seed)


def build_parser(command_name: str | None = None) -> argparse.ArgumentParser:
    """
    The parser of all commands; each sets `run` to its function.

    Args:
        command_name: The command that will be parsed: options that need packages of an extra to be known are left out for
            all others.
    """
    parser = argparse.ArgumentParser(prog="diffusers-adm", description="ADM and classifier guidance for diffusers.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("convert", help="convert published checkpoints to a folder that diffusers loads")
    command.add_argument("--unet", metavar="FILE", help="checkpoint of a UNet or an upsampler")
    command.add_argument("--classifier", metavar="FILE", help="checkpoint of a classifier")
    command.add_argument(
        "--flags", help='model flags of the published command line, as one string: --flags="--image_size 64 ..."'
    )
    command.add_argument("--output", metavar="DIR", required=True, help="folder to write, new or empty")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights; that of the checkpoint by default")
    command.add_argument("--variant", help="put into the names of the weight files, such as fp16")
    command.set_defaults(run=convert)

    command = commands.add_parser("demo", help="draw digits with the default model, guided and unguided")
    command.add_argument("--cascade", action="store_true", help="draw small digits, and enlarge them")
    command.add_argument(
        "--output", metavar="FILE", default="demo.png", help="picture to write (default: %(default)s)"
    )
    command.add_argument("--steps", type=int, default=25, help="of DDIM (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the first column (default: %(default)s)")
    command.set_defaults(run=demo)

    for name, (module, add_arguments, function, purpose) in EXTRA_COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if name == command_name:
            found = importlib.import_module(f"diffusers_adm.{module}")
            getattr(found, add_arguments)(command)
            command.set_defaults(run=getattr(found, function))
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv: Words of the command line; `None` means the process's own.

    Returns:
        The exit code: 0, or 2 if what was given cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser(argv[0] if argv else None)
    except ModuleNotFoundError as error:
        print(f"diffusers-adm {argv[0]}: error: {error}: pip install 'diffusers-adm[train,eval]'", file=sys.stderr)
        return 2
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"diffusers-adm {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
