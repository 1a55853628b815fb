"""Runs commands in this process, and returns their parsers."""

import importlib.util
import runpy
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from diffusers_adm.cli import main


def run(*words: str | Path | float) -> int:
    """Runs `diffusers-adm` with some words, and returns its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as exited:  # words that the parser refuses
        return exited.code


class Parsing(BaseException):
    """Carries the parser of a program that begins to parse its command line."""


def parser_of(program: Callable[[], object], words: list[str]) -> ArgumentParser:
    """Returns the parser of a program, which runs until it parses."""

    def stop(parser, *_):
        raise Parsing(parser)

    with mock.patch.object(sys, "argv", ["program", *words]), mock.patch.object(ArgumentParser, "parse_args", stop):
        with pytest.raises(Parsing) as caught:
            program()
    return caught.value.args[0]


def parser_of_module(module: str) -> ArgumentParser:
    """Returns the parser of `python -m module`."""
    path = importlib.util.find_spec(module).origin
    return parser_of(lambda: runpy.run_path(path, run_name="__main__"), [])


def command_parsers(command: str | None = None) -> dict[str, ArgumentParser]:
    """Returns the parsers of all commands of `diffusers-adm`. The parser of `command` has all its options."""
    parser = parser_of(main, [] if command is None else [command])
    (action,) = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    return action.choices
