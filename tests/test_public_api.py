"""The public surface of the package is what `tests/public_api.yaml` records: names, signatures and options.

Code of users depends on all of it, so a change must be deliberate, and so must an addition. After one, write the file anew, and
read its difference before you commit it:

    PYTHONPATH=tests/helpers python tests/test_public_api.py
"""

import functools
import importlib
import importlib.util
import inspect
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from command_line import command_parsers, parser_of_module
from documents import DOCUMENTS, ROOT


RECORD = Path(__file__).with_name("public_api.yaml")
# All public names of these are recorded. Of other modules, those that documents name, and those that were once recorded.
PACKAGES = ("diffusers_adm", "diffusers_adm.evaluation")
SCRIPTS = [f"python -m diffusers_adm.training.train_{kind}" for kind in ("unet", "classifier", "upsampler")]
SHARED = "every training script"
WITHOUT_OPTIONS = ("diffusers_adm.cli", "diffusers_adm.cards", "diffusers_adm.hub.cards")


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def documented_names() -> dict[str, set[str]]:
    """The modules that documents and the Makefile name, and what documents import from each."""
    names: dict[str, set[str]] = {module: set() for module in PACKAGES}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for module, imported in re.findall(r"^\s*from (diffusers_adm[.\w]*) import ([\w, ]+)", text, re.MULTILINE):
            names.setdefault(module, set()).update(imported.replace(" ", "").split(","))
        for words in re.findall(r"\bdiffusers_adm(?:\.\w+)+", text):
            module, _, name = words.rpartition(".")
            if is_module(words):
                names.setdefault(words, set())
            elif is_module(module):
                names.setdefault(module, set()).add(name)
    for module in re.findall(r"-m (diffusers_adm[.\w]+)", (ROOT / "Makefile").read_text(encoding="utf-8")):
        names.setdefault(module, set())
    return names


def public_names(module: ModuleType) -> set[str]:
    """The names that a package offers, without its submodules."""
    return {
        name
        for name in getattr(module, "__all__", vars(module))
        if hasattr(module, "__path__")
        and not name.startswith("_")
        and not isinstance(getattr(module, name), ModuleType)
    } - {"Path"}


def collect_names(recorded: dict[str, list[str]]) -> dict[str, list[str]]:
    """Returns the names that can be imported, of the recorded ones, the documented ones, and those of the packages."""
    wanted = documented_names()
    for module, names in recorded.items():
        wanted.setdefault(module, set()).update(names)
    found = {}
    for name in sorted(wanted):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        names = wanted[name] | (public_names(module) if name in PACKAGES else set())
        found[name] = sorted(attribute for attribute in names if hasattr(module, attribute))
    return found


def describe_default(value) -> str:
    return value.__name__ if inspect.isroutine(value) or inspect.isclass(value) else repr(value)


def signature_of(function: Callable) -> list[str]:
    """Parameters in their order, with their defaults; `self` is left out."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind == parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        default = "" if parameter.default is parameter.empty else f"={describe_default(parameter.default)}"
        words.append(f"{prefix}{parameter.name}{default}")
    return words[1:] if words[:1] == ["self"] else words


def methods_of(cls: type) -> dict[str, list[str] | str]:
    """Signatures of the methods that the package itself gives a class."""
    methods = {}
    for owner in cls.__mro__:
        if not owner.__module__.startswith("diffusers_adm"):
            continue
        for name, value in vars(owner).items():
            if name in methods or (name.startswith("_") and name not in ("__init__", "__call__")):
                continue
            if isinstance(value, (property, functools.cached_property)):
                methods[name] = "property"
            elif inspect.isroutine(getattr(cls, name)):
                methods[name] = signature_of(getattr(cls, name))
    return methods


def collect_signatures(names: dict[str, list[str]]) -> dict[str, list[str] | str]:
    """Signatures of the functions and of the classes' methods among some names."""
    found: dict[str, list[str] | str] = {}
    for module, attributes in names.items():
        for name in attributes:
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) and value.__module__.startswith("diffusers_adm"):
                found |= {f"{name}.{method}": signature for method, signature in methods_of(value).items()}
            elif inspect.isfunction(value) and name != "main":
                found[name] = signature_of(value)
    return dict(sorted(found.items()))


def options_of(parser: ArgumentParser) -> dict[str, str]:
    """Each option with its default, and what else it says about its values."""
    options = {}
    for action in parser._actions:
        if action.dest == "help" or action.help == SUPPRESS:
            continue
        default = "required" if action.required else "unset" if action.default == SUPPRESS else str(action.default)
        default = re.sub(r"\S*(?=/model_cards/)", "", default)
        values = "" if action.choices is None else f", one of: {' '.join(map(str, action.choices))}"
        number = "" if action.nargs is None else ", switch" if action.nargs == 0 else f", values: {action.nargs}"
        options[" ".join(action.option_strings) or action.dest] = default + number + values
    return options


def collect_options(modules: list[str]) -> dict[str, dict[str, str]]:
    """Options of the commands of `diffusers-adm`, and of the modules that are programs."""
    found = {}
    for command in command_parsers():
        found[f"diffusers-adm {command}"] = options_of(command_parsers(command)[command])
    for module in modules:
        path = Path(importlib.util.find_spec(module).origin)
        if module not in WITHOUT_OPTIONS and "__main__" in path.read_text(encoding="utf-8"):
            found[f"python -m {module}"] = options_of(parser_of_module(module))
    shared = {
        option: value
        for option, value in found[SCRIPTS[0]].items()
        if all(found[script].get(option) == value for script in SCRIPTS)
    }
    for script in SCRIPTS:
        found[script] = {option: value for option, value in found[script].items() if option not in shared}
    return {SHARED: shared, **found}


def recorded() -> dict:
    return yaml.safe_load(RECORD.read_text(encoding="utf-8"))


def differences(before: dict, after: dict) -> list[str]:
    """Returns the changes, one line per change."""
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"{key}: gone")
        elif key not in before:
            lines.append(f"{key}: new")
        elif isinstance(before[key], dict):
            lines += [f"{key} {line}" for line in differences(before[key], after[key])]
        elif before[key] != after[key]:
            old, new = before[key], after[key]
            if isinstance(old, list) and isinstance(new, list):
                gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
                changes = [f"without {gone}"] * bool(gone) + [f"with {come}"] * bool(come)
                lines.append(f"{key}: {', '.join(changes) or f'in another order: {new}'}")
            else:
                lines.append(f"{key}: {new!r}, recorded is {old!r}")
    return lines


def check(before: dict, after: dict) -> None:
    changes = differences(before, after)
    if changes:
        listed = "\n  ".join(changes)
        pytest.fail(f"The public surface changed:\n  {listed}\n\n{__doc__}", pytrace=False)


def test_names_are_the_recorded_ones():
    names = recorded()["names"]
    check(names, collect_names(names))


def test_signatures_are_the_recorded_ones():
    record = recorded()
    check(record["signatures"], collect_signatures(collect_names(record["names"])))


def test_options_are_the_recorded_ones():
    record = recorded()
    check(record["options"], collect_options(list(collect_names(record["names"]))))


def test_a_change_is_told_plainly():
    before = {"f": ["x", "y=1"], "g": ["x"], "p": {"--a": "1", "--b": "2"}}
    after = {"f": ["x", "y=2"], "p": {"--a": "1", "--b": "3", "--c": "4"}, "h": []}
    assert differences(before, after) == [
        "f: without ['y=1'], with ['y=2']",
        "g: gone",
        "p --b: '3', recorded is '2'",
        "p --c: new",
        "h: new",
    ]
    assert differences({"f": ["x", "y"]}, {"f": ["y", "x"]}) == ["f: in another order: ['y', 'x']"]


class Lines(yaml.SafeDumper):
    """Writes lists into lines, which are read as the signatures that they are."""

    def represent_list(self, data):
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


Lines.add_representer(list, Lines.represent_list)


def write_record() -> None:
    """Writes the surface as it is now; recorded names that can no longer be imported go."""
    names = collect_names(recorded()["names"] if RECORD.exists() else {})
    surface = {"names": names, "signatures": collect_signatures(names), "options": collect_options(list(names))}
    RECORD.write_text(yaml.dump(surface, Dumper=Lines, sort_keys=False, width=119), encoding="utf-8")


if __name__ == "__main__":
    write_record()
