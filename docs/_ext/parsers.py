"""Parsers of all commands and scripts, for the pages that list their options."""

import re
from argparse import ArgumentParser
from functools import partial

from command_line import command_parsers, parser_of_module
from sphinx_argparse_cli import _logic


def with_short_usage(parser: ArgumentParser) -> ArgumentParser:
    """Keeps the usage line of a parser as its help shows it, because the extension would format it anew."""
    parser.usage = parser.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
    return parser


def command(name: str) -> ArgumentParser:
    """Returns the parser of one command of `diffusers-adm`."""
    return with_short_usage(command_parsers(name)[name])


def module(name: str) -> ArgumentParser:
    """Returns the parser of a module that is run by `python -m`."""
    return with_short_usage(parser_of_module(name))


def with_literal_json(text: str, load_help_text=_logic.load_help_text) -> str:
    """Marks objects in JSON as literals. The extension would mark their quotes and braces one by one."""
    parts = re.split(r'(\{".*?\})(?=[ .,])', text)
    return "".join(f"``{part}``" if index % 2 else load_help_text(part) for index, part in enumerate(parts))


_logic.load_help_text = with_literal_json


ablate = partial(command, "ablate")
convert = partial(command, "convert")
demo = partial(command, "demo")
evaluate = partial(command, "evaluate")
export = partial(command, "export")
inspect_data = partial(command, "inspect-data")
make_reference = partial(command, "make-reference")
nll = partial(command, "nll")
page = partial(command, "page")
released = partial(command, "released")
sample = partial(command, "sample")
search_steps = partial(command, "search-steps")
sweep = partial(command, "sweep")

train_unet = partial(module, "diffusers_adm.training.train_unet")
train_classifier = partial(module, "diffusers_adm.training.train_classifier")
train_upsampler = partial(module, "diffusers_adm.training.train_upsampler")
train_consistency = partial(module, "diffusers_adm.training.train_consistency")

anomaly_map = partial(module, "diffusers_adm.examples.anomaly_map")
counterfactual = partial(module, "diffusers_adm.examples.counterfactual")
ddnm = partial(module, "diffusers_adm.examples.ddnm")
dps = partial(module, "diffusers_adm.examples.dps")
repaint = partial(module, "diffusers_adm.examples.repaint")
sdedit = partial(module, "diffusers_adm.examples.sdedit")
symmetry = partial(module, "diffusers_adm.examples.symmetry")

bench_gpu = partial(module, "diffusers_adm.benchmarks.gpu")
bench_guidance = partial(module, "diffusers_adm.benchmarks.guidance")
bench_metrics = partial(module, "diffusers_adm.benchmarks.metrics")
bench_overhead = partial(module, "diffusers_adm.benchmarks.overhead")
bench_sampling = partial(module, "diffusers_adm.benchmarks.sampling")
bench_step = partial(module, "diffusers_adm.benchmarks.step")
bench_training = partial(module, "diffusers_adm.benchmarks.training")
