"""Help of every command, training script, benchmark and example: groups, types, defaults and examples of all options."""

import argparse
import importlib
import re
import shlex

import pytest
from command_line import command_parsers, parser_of_module
from tiny_models import tiny_pipeline

from diffusers_adm.cli import COMMANDS, build_parser


SCRIPTS = {
    f"python -m diffusers_adm.training.train_{kind}": f"diffusers_adm.training.train_{kind}"
    for kind in ("unet", "classifier", "upsampler", "consistency")
}
BENCHMARKS = {
    f"python -m diffusers_adm.benchmarks.{name}": f"diffusers_adm.benchmarks.{name}"
    for name in ("gpu", "guidance", "metrics", "overhead", "sampling", "step", "training")
}
EXAMPLES = {
    f"python -m diffusers_adm.examples.{name}": f"diffusers_adm.examples.{name}"
    for name in ("anomaly_map", "counterfactual", "ddnm", "dps", "repaint", "sdedit", "symmetry")
}
MODULES = SCRIPTS | BENCHMARKS | EXAMPLES


def parser_of(program: str) -> argparse.ArgumentParser:
    if program in MODULES:
        return parser_of_module(MODULES[program])
    command = program.partition(" ")[2]
    return command_parsers(command)[command] if command else build_parser("")


every_program = pytest.mark.parametrize(
    "program", ["diffusers-adm", *(f"diffusers-adm {command}" for command in COMMANDS), *MODULES]
)


@every_program
def test_each_option_has_a_heading_a_type_and_a_default(program):
    parser = parser_of(program)
    for group in parser._action_groups:
        for action in group._group_actions:
            others = (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)
            if isinstance(action, others) or action.help == argparse.SUPPRESS:
                continue
            name = f"{action.option_strings or action.dest} of {program}"
            assert group.title != "options", f"{name} is in no group."
            assert action.nargs == 0 or action.metavar or action.choices, f"{name} does not say its type."
            text = action.help % vars(action)
            assert text.endswith(".") and text[0].isupper(), f"{name}: {text}"
            end = text.rpartition(". ")[2]
            assert end == "Required." if action.required else re.match(r"Default: .+\.", end), f"{name}: {text}"
            assert text.count("efault: ") == (not action.required), f"{name}: {text}"


@every_program
def test_usage_is_a_short_line(program):
    usage = parser_of(program).format_usage()
    assert usage.startswith(f"usage: {program} [options]")
    assert usage.count("\n") == 1 and len(usage) < 90


@every_program
def test_help_ends_with_examples_that_are_understood(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = parser_of(program)
    title, *examples = parser.epilog.splitlines()
    assert title == "examples:" and len(examples) >= 2
    assert parser.format_help().endswith(parser.epilog + "\n")
    for example in examples:
        words = shlex.split(example.partition("|")[0])
        known = program.split()
        assert words[: len(known)] == known
        words = words[len(known) :]
        if program == "diffusers-adm":
            assert build_parser(words[0]).parse_args(words).run
        elif program in SCRIPTS:
            for option, path in zip(words, words[1:]):
                if option == "--config":
                    (tmp_path / path).parent.mkdir(parents=True)
                    (tmp_path / path).write_text("output_dir: run\nmax_train_steps: 1\n")
                if option == "--pretrained_model_name_or_path":
                    tiny_pipeline().save_pretrained(tmp_path / path)
            assert importlib.import_module(SCRIPTS[program]).parse_args(words).output.output_dir
        else:
            parser.parse_args(words)


def test_either_length_of_a_training_run_is_said_to_be_needed():
    for script in SCRIPTS:
        text = " ".join(parser_of(script).format_help().split())
        assert "Either this option or --num_epochs is required, and the later one counts." in text
        assert "Either this option or --max_train_steps is required." in text


@pytest.mark.parametrize("command", ["sample", "sweep"])
def test_options_in_json_say_so(command):
    parser = command_parsers(command)[command]
    for name in ("guidance_options", "timesteps", "sigmas", "churn", "restart", "weaker", "guider", "epsilon_scale"):
        (action,) = [action for action in parser._actions if action.dest == name]
        assert "JSON" in action.metavar and " JSON" in action.help
