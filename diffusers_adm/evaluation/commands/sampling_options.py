"""Arguments of the pipelines' calls as options of commands."""

import argparse
import contextlib
import json
from collections.abc import Callable

from diffusers_adm.evaluation.schedulers import SCHEDULERS
from diffusers_adm.pipelines.options import SamplingOptions


def parse_value(text: str) -> bool | float | int | str | list | dict | None:
    """Parses a word of the command line: a number, true, false, none, a list or an object in JSON, or else a text."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def option_type(name: str) -> Callable[[str], object]:
    """Returns the parser of a call's argument: respacing strings may look like numbers."""
    return str if name == "timestep_respacing" else parse_value


def add_sampling_options(
    parser: argparse.ArgumentParser, title: str, description: str, nargs: str | None = None
) -> None:
    """
    Adds the arguments of the pipelines' calls that hold for a whole run.

    Args:
        parser: Parser to add to.
        title: Heading of the options.
        description: Sentence below the heading.
        nargs: `"+"` for several values of each option.
    """
    group = parser.add_argument_group(title, description)
    group.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        default=None if nargs is None else [None],
        nargs=nargs,
        help="Scheduler, instead of the pipeline's. -guided: as its authors advise for guided sampling; -Karras: with the noise"
        " levels of Karras et al. 2022.",
    )
    for name, text in SamplingOptions.recorded().items():
        group.add_argument(
            f"--{name}", type=option_type(name), nargs=nargs, default=argparse.SUPPRESS, metavar="VALUE", help=text
        )


def given_sampling_options(args: argparse.Namespace) -> dict:
    """Returns the options of `add_sampling_options` that the command line gives, except for the scheduler."""
    return {name: getattr(args, name) for name in SamplingOptions.recorded() if hasattr(args, name)}
