"""Options that are declared as the fields of dataclasses."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusers_adm.options import (
    Check,
    add_options,
    at_least,
    build_options,
    in_range,
    option,
    option_group,
    option_values,
    options_of,
)


@dataclass
class Shape:
    sizes: tuple[int, ...] = option((1, 2), help="Sizes of the layers.", check=Check("given", len))
    width: float | None = option(None, help="Width.", check=at_least(1))
    flip: bool = option(True, help="Flip.")
    exact: bool = option(False, help="Be exact.", negatable=True)


@dataclass
class Run:
    output: Path = option(help="Folder of the run.", resumable=True)
    names: list[str] | None = option(None, help="Names, such as train[:90%].")
    fast: bool = option(False, help="Be fast.")
    mode: str = option("a", help="Mode.", choices=("a", "b"))
    computed: int = 7
    shape: Shape = option_group(Shape, "shape", width=2.0)


def parser():
    parser = argparse.ArgumentParser()
    add_options(parser, Run)
    return parser


def parsed(*words):
    return build_options(Run, parser().parse_args(["--output", "out", *words]))


def test_defaults_are_those_of_the_fields_and_of_the_group():
    assert parsed() == Run(Path("out"), shape=Shape(width=2.0)) == Run(Path("out"))


def test_words_are_parsed_as_the_annotations_say():
    run = parsed(*"--names x y --fast --mode b --sizes 3,4 --width 1.5 --no-flip --exact".split())
    assert run == Run(Path("out"), ["x", "y"], True, "b", shape=Shape((3, 4), 1.5, False, True))


def test_only_switches_that_are_on_or_negatable_can_be_put_off():
    forms = [word for action in parser()._actions for word in action.option_strings if word.startswith("--no-")]
    assert forms == ["--no-flip", "--no-exact"]


def test_help_says_type_and_default():
    text = " ".join(parser().format_help().split())
    assert "--output PATH Folder of the run. Required." in text
    assert "--names TEXT [TEXT ...] Names, such as train[:90%]." in text
    assert "--mode {a,b} Mode. Default: a." in text
    assert "shape: --sizes INT,... Sizes of the layers. Default: 1,2." in text
    assert "--width FLOAT Width. Default: 2.0." in text and "Flip. Default: on." in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width", "0.5"], "--width 0.5 must be at least 1."),
        (["--width", "nan"], "--width nan must be finite."),
        (["--width", "inf"], "--width inf must be finite."),
        (["--sizes", ""], "--sizes  must be given."),
    ],
)
def test_values_are_checked(words, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        parsed(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", ""], "argument --output: a value is required, but got ''"),
        (["--output", " "], "argument --output: a value is required, but got ' '"),
        (["--names", "x", ""], "argument --names: a value is required, but got ''"),
        (["--sizes", "1,,2"], "argument --sizes: invalid comma-separated int value: '1,,2'"),
    ],
)
def test_words_that_say_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*words)
    assert message in capsys.readouterr().err


def test_range_holds_its_bounds():
    assert [in_range(0, 1).accepts(value) for value in (-0.1, 0, 1, 1.1)] == [False, True, True, False]


def test_options_can_be_left_out_and_given_other_defaults():
    parser = argparse.ArgumentParser()
    add_options(parser, Shape, without=("flip", "exact"), sizes=(9,))
    args = parser.parse_args([])
    assert vars(args) == {"sizes": (9,), "width": None}
    assert build_options(Shape, args) == Shape((9,))


def test_names_and_values_are_flat():
    run = parsed("--no-flip")
    assert list(options_of(Run)) == list(option_values(run))
    assert option_values(run)["flip"] is False and "computed" not in option_values(run)
    assert options_of(Run)["output"].notes == {"resumable": True}
    assert {field.name for field in dataclasses.fields(Shape)} < set(options_of(Run))


def test_options_that_are_not_given_may_leave_no_trace():
    parser = argparse.ArgumentParser()
    add_options(parser, Shape, only_given=True)
    assert vars(parser.parse_args(["--sizes", "1,2", "--no-flip"])) == {"sizes": (1, 2), "flip": False}
    assert "Default: 1,2." in parser.format_help()
