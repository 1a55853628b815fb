"""Code files of saved pipelines and models. Each file defines one class and everything of this package that the class needs.

With `trust_remote_code=True`, diffusers loads the classes of a pipeline from files in its folder. The file of a component cannot
import other files of the folder. Therefore each file holds everything that its class needs. It is made from the sources of the package.

Laws for every module that `pipelines/` or `models/` import, directly or indirectly:

1. At top level, a module only imports and defines: functions, classes and constants.
2. The name of a top-level definition is unique among these modules.
3. Names of this package are imported at top level by `from ... import ...`, without `as`.
4. Code of a file calls a method of `LEFT_OUT` only if diffusers has a method of the same name.
5. In the file of a pipeline, the class of a component is `ModelMixin`, because the real class is in another file.

A violation of one of the first three laws raises a `ValueError` when a pipeline is saved. Code that only methods of `LEFT_OUT` use is
left out of the files.
"""

import ast
import importlib.util
import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from diffusers_adm.atomic_files import write_json
from diffusers_adm.hub.cards import save_card
from diffusers_adm.hub.saved_files import SAVED_CLASSES, add_code, add_file


PACKAGE = __package__.partition(".")[0]
# Methods that are left out of the files. They convert checkpoints of the original code, load with classes of this package, or replace a
# method of diffusers that the files use instead.
LEFT_OUT = {"from_openai", "from_released", "to_openai_state_dict", "from_pretrained", "load_config", "push_to_hub"}
# Modules that are replaced by another module in the files, so that a class that was loaded from a file saves the same file again.
REPLACED = {f"{PACKAGE}.hub.{name}": f"{PACKAGE}.hub.saved_files" for name in ("bundle", "cards")}


def write_code(pipeline, folder: Path) -> None:
    """
    Adds the code files to a folder that `save_pretrained` has just written, and enters them in the index of the folder.

    Args:
        pipeline: Pipeline that was saved.
        folder: Folder of the saved pipeline.
    """
    add_code(pipeline, folder, single_file)


def save_model(model, folder: str | os.PathLike, **kwargs) -> None:
    """
    Saves a single model with its card and the code of its class. Users can then load it without this package:
    `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        model: Model of this package.
        folder: Folder to write.
        kwargs: Arguments of `save_pretrained`.
    """
    model.save_pretrained(folder, **kwargs)
    stem, name = add_file(type(model), Path(folder), single_file)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "auto_map": {"AutoModel": f"{stem}.{name}"}}, sort_keys=True)
    save_card(model, folder)


def single_file(cls: type) -> str:
    """
    Returns the source of one file that defines a class of this package and everything of this package that the class needs.

    Raises:
        ValueError: If the sources of the package break one of the first three laws.
    """
    modules: dict[str, Module] = {}
    _collect(cls.__module__, modules)
    needs = _find_needs(cls.__name__, _all_definitions(modules))
    if needs.components:
        needs.imports.add("from diffusers import ModelMixin")
    parts = [
        f'"""{cls.__name__} of {PACKAGE}, with everything that it needs, in one file.\n\n`save_pretrained` made this file from the'
        ' sources of the package. Apache License 2.0.\n"""\n',
        "\n".join(sorted(needs.imports, key=lambda line: (line.startswith("from"), line))) + "\n\n",
    ]
    if needs.components:
        parts.append("# For annotations only, because the classes of the components are in other files.")
        parts += [f"{name} = ModelMixin" for name in sorted(needs.components)]
    for module in modules.values():
        chosen = [node for name, node in module.definitions.items() if name in needs.names]
        parts += [f"\n{module.source(node)}\n" for node in dict.fromkeys(chosen)]
    return "\n".join(parts)


@dataclass
class Needs:
    """
    Definitions and imports that a file must hold.

    Args:
        names: Names of definitions of this package.
        imports: Lines that import from other packages.
        components: Names of classes that are saved in other files.
    """

    names: set[str] = field(default_factory=set)
    imports: set[str] = field(default_factory=set)
    components: set[str] = field(default_factory=set)


def _collect(name: str, modules: dict[str, "Module"]) -> None:
    """Reads a module, after the modules of this package that it imports."""
    if name in modules:
        return
    module = Module(name)
    for imported in module.needs:
        _collect(imported, modules)
    modules[name] = module


def _all_definitions(modules: dict[str, "Module"]) -> dict[str, tuple["Module", ast.stmt]]:
    definitions: dict[str, tuple[Module, ast.stmt]] = {}
    for module in modules.values():
        for name, node in module.definitions.items():
            if name in definitions:
                raise ValueError(
                    f"{name} must have one definition, but {definitions[name][0].name} and {module.name} define it."
                )
            definitions[name] = (module, node)
    return definitions


def _find_needs(class_name: str, definitions: dict[str, tuple["Module", ast.stmt]]) -> Needs:
    """Returns what a class uses, directly or through other definitions."""
    needs, pending = Needs(names={class_name}), [class_name]
    while pending:
        module, node = definitions[pending.pop()]
        for name in module.names_used(node):
            if name in SAVED_CLASSES and name != class_name:
                needs.components.add(name)
            elif name in definitions and name not in needs.names:
                needs.names.add(name)
                pending.append(name)
            elif name in module.imports:
                needs.imports.add(module.imports[name])
    return needs


class Module:
    """
    Imports and definitions of a module of this package.

    Args:
        name: Full name of the module.

    Raises:
        ValueError: If the module does more than define and import, or imports a name of this package under another name.
    """

    def __init__(self, name: str):
        self.name = name
        loaded = sys.modules.get(name) or importlib.import_module(name)
        text = inspect.getsource(loaded)
        self.lines = text.splitlines()
        self.needs: list[str] = []
        self.imports: dict[str, str] = {}  # line that imports a name, by name
        self.definitions: dict[str, ast.stmt] = {}
        self._package = name if hasattr(loaded, "__path__") else name.rpartition(".")[0]
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(node)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.definitions.update({target.id: node for target in targets if target.id != "__all__"})
            elif not isinstance(node, ast.Expr):  # a docstring
                raise ValueError(f"{name} must only define and import at top level, but line {node.lineno} does more.")

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == PACKAGE):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), self._package)
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{self.name} must import names of {origin} without `as`.")
            self.needs.append(REPLACED.get(origin, origin))
            return
        for alias in node.names:
            line = f"import {alias.name}"
            if isinstance(node, ast.ImportFrom):
                line = f"from {node.module} {line}"
            elif alias.name.split(".")[0] == PACKAGE:
                raise ValueError(f"{self.name} must import names from {alias.name}, but imports the module.")
            if alias.asname:
                line += f" as {alias.asname}"
            self.imports[alias.asname or alias.name.split(".")[0]] = line

    def _left_out(self, node: ast.stmt) -> list[ast.stmt]:
        if not isinstance(node, ast.ClassDef):
            return []
        return [member for member in node.body if isinstance(member, ast.FunctionDef) and member.name in LEFT_OUT]

    def names_used(self, node: ast.stmt) -> set[str]:
        """Returns the names that a definition uses. Methods that are left out of the files do not count."""
        without = {id(inner) for member in self._left_out(node) for inner in ast.walk(member)}
        return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and id(inner) not in without}

    def source(self, node: ast.stmt) -> str:
        """Returns the lines of a definition with the comments above it. Methods of `LEFT_OUT` are left out."""
        kept = list(range(self._first_line(node), node.end_lineno + 1))
        for member in self._left_out(node):
            # The empty line below the method goes too.
            gone = range(self._first_line(member), member.end_lineno + 2)
            kept = [line for line in kept if line not in gone]
        return "\n".join(self.lines[line - 1] for line in kept).rstrip()

    def _first_line(self, node: ast.stmt) -> int:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first
