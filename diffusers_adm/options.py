"""Command-line options that are declared as the fields of dataclasses.

[`option`] makes a field that carries its help, its choices and its check. [`option_group`] makes a field that holds another
such dataclass, whose options have a heading of their own. [`add_options`] builds a parser from the fields, and
[`build_options`] builds the dataclass from parsed arguments.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


OptionsClass = typing.TypeVar("OptionsClass")

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Check:
    """
    Condition that the value of an option must meet.

    Args:
        requirement: End of the sentence "The value must be ...".
        accepts: Function that returns whether a value meets the condition.
    """

    requirement: str
    accepts: Callable[[Any], bool]


def at_least(minimum: float) -> Check:
    """Returns the check of a lower bound."""
    return Check(f"at least {minimum}", lambda value: value >= minimum)


def above(bound: float) -> Check:
    """Returns the check of a lower bound that is no allowed value itself."""
    return Check(f"above {bound}", lambda value: value > bound)


def in_range(minimum: float, maximum: float) -> Check:
    """Returns the check of two bounds, which are allowed values."""
    return Check(f"in [{minimum}, {maximum}]", lambda value: minimum <= value <= maximum)


@dataclass(frozen=True)
class OptionInfo:
    """Description of an option, see [`option`]. The field that it belongs to decides `kind`, the type of its values."""

    default: Any
    help: str
    choices: Collection | None
    metavar: str | None
    parse: Callable[[str], Any] | None
    check: Check | None
    negatable: bool
    unset: str
    notes: dict[str, Any]
    kind: Any = None

    @property
    def is_switch(self) -> bool:
        """Whether the option is given without a value."""
        return self.kind is bool

    @property
    def takes_several_words(self) -> bool:
        """Whether the values of the option are given as several words."""
        return typing.get_origin(self.kind) is list


@dataclass(frozen=True)
class GroupInfo:
    """Description of a group of options, see [`option_group`]."""

    options: type
    title: str
    defaults: dict[str, Any]


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Collection | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    check: Check | None = None,
    negatable: bool = False,
    unset: str = "none",
    **notes: Any,
) -> Any:
    """
    Makes a dataclass field that is an option of the same name.

    The annotation of the field decides how words are parsed. A tuple is given with commas, such as `1,2,4`, and a list as
    several words. Of several types that are joined by `|`, the first is parsed. A boolean is a switch.

    Args:
        default: Default value. The option is required without it.
        help: Sentence for the parser's help, which adds the default.
        choices: Allowed values.
        metavar: Name of the value in the help. It is the type's by default.
        parse: Function that parses a word, instead of the type of the annotation.
        check: Condition on values that are not `None`.
        negatable: Whether a switch that is off by default has a `--no-` form. Switches that are on by default always have it.
        unset: Meaning of the default `None`, or of an empty text, which the help shows.
        notes: Further facts for the code that uses the options.
    """
    info = OptionInfo(default, help, choices, metavar, parse, check, negatable or default is True, unset, notes)
    return dataclasses.field(default=default, metadata={"option": info})


def option_group(options: type, title: str, **defaults: Any) -> Any:
    """
    Makes a dataclass field that holds another dataclass of options.

    Args:
        options: The other dataclass.
        title: Heading of the options in the parser's help.
        defaults: Defaults that replace those of the other dataclass.
    """
    info = GroupInfo(options, title, defaults)
    return dataclasses.field(default_factory=lambda: options(**defaults), metadata={"group": info})


def options_of(options: type) -> dict[str, OptionInfo]:
    """Returns the options of a dataclass and of its groups by their names. Other fields are left out."""
    infos: dict[str, OptionInfo] = {}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if "group" in field.metadata:
            infos |= options_of(field.metadata["group"].options)
        elif "option" in field.metadata:
            infos[field.name] = dataclasses.replace(field.metadata["option"], kind=_first_type(hints[field.name]))
    return infos


def option_values(options: Any) -> dict[str, Any]:
    """Returns the values of a dataclass's options and of those of its groups by their names."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if "group" in field.metadata:
            values |= option_values(getattr(options, field.name))
        elif "option" in field.metadata:
            values[field.name] = getattr(options, field.name)
    return values


def add_options(
    parser: argparse.ArgumentParser,
    options: type,
    *,
    without: Collection[str] = (),
    title: str | None = None,
    only_given: bool = False,
    **defaults,
) -> None:
    """
    Adds the options of a dataclass to a parser.

    Args:
        parser: Parser to add to.
        options: The dataclass.
        without: Names of options that are not added.
        title: Heading of the options that are in no group.
        only_given: Whether parsed arguments lack the options that a command line does not give.
        defaults: Defaults that replace those of the dataclass.
    """
    target = parser if title is None else parser.add_argument_group(title)
    known = options_of(options)
    for field in dataclasses.fields(options):
        if "group" in field.metadata:
            group = field.metadata["group"]
            add_options(
                parser, group.options, without=without, title=group.title, only_given=only_given, **group.defaults
            )
        elif "option" in field.metadata and field.name not in without:
            action = _add_option(target, field.name, known[field.name], defaults.get(field.name, field.default))
            if only_given:
                action.default = argparse.SUPPRESS


def _add_option(target: Any, name: str, info: OptionInfo, default: Any) -> argparse.Action:
    required = default is dataclasses.MISSING
    words: dict[str, Any] = {"required": True} if required else {"default": default}
    if info.is_switch:
        words["action"] = argparse.BooleanOptionalAction if info.negatable else "store_true"
    else:
        items = typing.get_args(info.kind) if typing.get_origin(info.kind) in (list, tuple) else ()
        kind, metavar = info.kind, METAVARS.get(items[0] if items else info.kind)
        if info.takes_several_words:
            kind, words["nargs"] = items[0], "+"
        elif items:
            kind, metavar = comma_separated(items[0]), f"{metavar},..."
        words["type"] = info.parse or (text_as(kind) if kind in (str, Path) and default != "" else kind)
        words["choices"] = info.choices
        words["metavar"] = info.metavar or (None if info.choices else metavar)
    shown = "Required." if required else f"Default: {info.unset if default in (None, '') else _as_text(default)}."
    return target.add_argument(f"--{name}", help=f"{info.help} {shown}".replace("%", "%%"), **words)


def _first_type(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)[0]
    return hint


def _as_text(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)


def add_examples(parser: argparse.ArgumentParser, *commands: str) -> None:
    """Adds examples below the help of a command."""
    parser.epilog = "\n  ".join(["examples:", *commands])


def text_as(kind: type = str) -> Callable[[str], Any]:
    """Returns a function that parses a text that is not blank: an empty path would mean the current folder."""

    def parse(text: str) -> Any:
        if not text.strip():
            raise argparse.ArgumentTypeError(f"a value is required, but got {text!r}")
        return kind(text)

    return parse


def comma_separated(kind: type) -> Callable[[str], tuple]:
    """Returns a function that parses values with commas between them."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",")) if text else ()

    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def build_options(options: type[OptionsClass], args: argparse.Namespace) -> OptionsClass:
    """
    Builds a dataclass from parsed arguments, and checks its values. Options that the parser lacks keep their defaults.

    Raises:
        ValueError: If a number is not finite, a text is empty, or a value does not meet its check.
    """
    values = {}
    for field in dataclasses.fields(options):
        if "group" in field.metadata:
            values[field.name] = build_options(field.metadata["group"].options, args)
        elif "option" in field.metadata and hasattr(args, field.name):
            values[field.name] = getattr(args, field.name)
    for message in _failed_checks(options, values):
        raise ValueError(message)
    return options(**values)


def _failed_checks(options: type, values: dict[str, Any]) -> Iterator[str]:
    for field in dataclasses.fields(options):
        info, value = field.metadata.get("option"), values.get(field.name)
        if info is None or value is None:
            continue
        parts = value if isinstance(value, (tuple, list)) else [value]
        shown = ",".join(map(str, parts))
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            yield f"--{field.name} {shown} must be finite."
        elif info.check is not None and not info.check.accepts(value):
            yield f"--{field.name} {shown} must be {info.check.requirement}."
