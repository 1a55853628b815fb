"""Arguments of the pipelines' calls as options of commands."""

import argparse
import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from diffusers_adm.choices import WEAKER_KINDS
from diffusers_adm.evaluation.options import (
    PRECONDITIONED_SCHEDULERS,
    SAMPLING_OPTIONS,
    SCHEDULERS,
    parsed_scheduler,
)
from diffusers_adm.options import text_as


@dataclass(frozen=True)
class Value:
    """
    Parser of one argument of a pipeline's call. It accepts JSON of some types, and the word none for the pipeline's default.

    Args:
        types: Types that the value may have.
        description: Name of the types, for the message.
    """

    types: tuple[type, ...]
    description: str

    def __call__(self, text: str) -> Any:
        """Parses a word of the command line."""
        if text.lower() in ("none", "null"):
            return None
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            value = json.loads(text.lower() if self.types == (bool,) else text)
            if type(value) in self.types:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {self.description}")


def weaker_prediction(text: str) -> str | dict | None:
    """Parses the name of a weaker prediction, or its options in JSON."""
    if text in WEAKER_KINDS:
        return text
    return Value((dict,), f"one of {', '.join(WEAKER_KINDS)}, or an object in JSON with the entry kind")(text)


def place_of_function(text: str) -> str | None:
    """Parses the file and the name of a guidance function."""
    return None if text.lower() in ("none", "null") else text_as(str)(text)


NUMBER = Value((int, float), "one number, which holds for the whole run")
PARSERS = {
    "guidance_scale": NUMBER,
    "cfg_weight": NUMBER,
    "eta": NUMBER,
    "num_inference_steps": Value((int,), "a whole number"),
    "condition_unet": Value((bool,), "true or false"),
    "guider": Value((dict,), 'an object in JSON, such as {"kind": "ClassifierFreeGuidance"}'),
    "guidance_fn": place_of_function,
    "guidance_options": Value((dict,), 'an object in JSON, such as {"every": 2}'),
    "timesteps": Value((list,), "a list in JSON, such as [90,60]"),
    "timestep_respacing": text_as(str),
    "weaker": weaker_prediction,
    "epsilon_scale": Value((int, float, list), "a number, or a pair in JSON, such as [0.0001,1.0]"),
    "particles": Value((int,), "a whole number"),
    "churn": Value((dict,), 'an object in JSON, such as {"s_churn": 40}'),
    "sigmas": Value((list,), "a list in JSON, such as [10,1]"),
    "restart": Value((dict, list), 'an object in JSON, such as {"sigma_min": 0.3, "sigma_max": 2}, or a list of them'),
}


def add_sampling_options(
    parser: argparse.ArgumentParser,
    title: str,
    description: str,
    nargs: str | None = None,
    without: Collection[str] = (),
) -> None:
    """
    Adds the arguments of the pipelines' calls that hold for a whole run.

    Args:
        parser: Parser to add to.
        title: Heading of the options.
        description: Sentence below the heading.
        nargs: `"+"` for several values of each option.
        without: Options to leave out.
    """
    group = parser.add_argument_group(title, description)
    names = sorted(SCHEDULERS + PRECONDITIONED_SCHEDULERS)
    if "scheduler" not in without:
        group.add_argument(
            "--scheduler",
            type=parsed_scheduler,
            choices=names,
            default=None if nargs is None else [None],
            nargs=nargs,
            metavar="NAME",
            help=f"Scheduler of diffusers: {', '.join(names)}. -guided: with the settings that its authors advise for guided sampling."
            " -Karras: with the noise levels of Karras et al. 2022. Names of classes, such as DDIMScheduler, are also accepted. Default:"
            " the pipeline's.",
        )
    for name, (metavar, text) in SAMPLING_OPTIONS.items():
        if name not in without:
            group.add_argument(
                f"--{name}", type=PARSERS[name], nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=text
            )


def given_sampling_options(args: argparse.Namespace) -> dict:
    """Returns the options of `add_sampling_options` that the command line gives, except for the scheduler."""
    return {name: getattr(args, name) for name in SAMPLING_OPTIONS if hasattr(args, name)}
