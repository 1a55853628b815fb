"""Structure of the package: functions fit a screen, files stay short, and imports point one way."""

import ast
import io
import tokenize
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SOURCES = {
    "diffusers_adm": "diffusers_adm",
    "pipelines": "diffusers_adm.pipelines",
    "training": "diffusers_adm.training",
}
MODULES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for folder, package in SOURCES.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450

# The modules that read words of a command line. All others take parameters.
COMMAND_LINE = {
    "diffusers_adm.ablation.command",
    "diffusers_adm.cli",
    "diffusers_adm.command_line",
    "diffusers_adm.commands.convert",
    "diffusers_adm.commands.demo",
    "diffusers_adm.commands.export",
    "diffusers_adm.commands.inspect_data",
    "diffusers_adm.commands.released",
    "diffusers_adm.evaluation.commands.evaluate",
    "diffusers_adm.evaluation.commands.make_reference",
    "diffusers_adm.evaluation.commands.nll",
    "diffusers_adm.evaluation.commands.sample",
    "diffusers_adm.evaluation.commands.sampling_options",
    "diffusers_adm.evaluation.commands.search_steps",
    "diffusers_adm.evaluation.commands.sweep",
    "diffusers_adm.options",
    "diffusers_adm.examples.digits",
    "diffusers_adm.page.command",
    "diffusers_adm.benchmarks.gpu",
    "diffusers_adm.benchmarks.guidance",
    "diffusers_adm.benchmarks.metrics",
    "diffusers_adm.benchmarks.overhead",
    "diffusers_adm.benchmarks.sampling",
    "diffusers_adm.benchmarks.step",
    "diffusers_adm.benchmarks.training",
    "diffusers_adm.training.configuration",
}

# What a module imports lies in its own part of the package, or in a lower layer; the layers are listed from the lowest.
LAYERS = (
    {"checks", "choices", "lazy_modules"},
    {
        "atomic_files",
        "betas",
        "command_line",
        "launch",
        "options",
        "progress",
        "quiet",
        "records",
        "respacing",
        "saved_folders",
        "shipped",
    },
    {"data", "diffusion", "openai"},
    {"hub", "losses", "models", "solvers"},
    {"guidance"},
    {"pipelines"},
    {"diffusers_adm"},
    {"denoiser"},
    {"conversion", "demo", "evaluation", "examples", "export", "training"},
    {"ablation", "benchmarks", "commands", "page"},
    {"cli"},
)


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold more than blanks and comments."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of code of each function, without signature and docstring."""
    text = path.read_text(encoding="utf-8")
    code, lengths = code_lines(text), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            if body:
                length = len(code & set(range(body[0].lineno, node.end_lineno + 1)))
                lengths[node.name] = max(length, lengths.get(node.name, 0))
    return lengths


def imported_modules(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, node.module] if node.module else parents)
            submodules = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {module}
    return {module for module in found if module in MODULES}


def part_of(name: str) -> str:
    """The part of the package in which a module lies."""
    return name.split(".")[1] if "." in name else name


def moved(name: str) -> bool:
    """Returns whether a module is only an old name of another."""
    return MODULES[name].read_text(encoding="utf-8").startswith('"""Moved to ')


def refuse(found: list[str], what: str) -> None:
    if found:
        pytest.fail("\n  ".join([f"{what}:", *found]), pytrace=False)


def test_lines_are_counted_without_signature_docstring_blanks_and_comments(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'class A:\n    def f(\n        self, x\n    ):\n        """A\n        docstring."""\n\n        # A comment.\n'
        "        y = [\n            x,  # another\n        ]\n\n        return y\n\n\nclass B:\n    def f(self): ...\n"
    )
    assert function_lengths(path) == {"f": 4}


def test_functions_fit_a_screen():
    found = [
        f"{path.relative_to(ROOT)} {function}"
        for path in MODULES.values()
        for function, length in function_lengths(path).items()
        if length > MAX_FUNCTION_LINES
    ]
    refuse(found, f"Functions of more than {MAX_FUNCTION_LINES} lines of code")


def test_files_are_short():
    files = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    found = [
        str(path.relative_to(ROOT))
        for path in files
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
    ]
    refuse(found, f"Files of more than {MAX_FILE_LINES} lines")


def test_command_lines_are_read_in_one_layer():
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "argparse" in imported or (isinstance(node, ast.ImportFrom) and node.module == "argparse"):
                found.add(name)
    refuse(sorted(found - COMMAND_LINE), "Modules that import argparse")


@pytest.mark.parametrize("name", [name for name in MODULES if not moved(name)])
def test_imports_point_one_way(name):
    part = part_of(name)
    (layer,) = [number for number, parts in enumerate(LAYERS) if part in parts] or pytest.fail(
        f"{name} has no place in LAYERS.", pytrace=False
    )
    lower = set().union(*LAYERS[:layer], {part})
    upwards = {module for module in imported_modules(name) if part_of(module) not in lower}
    assert not upwards, f"{name} may import from {sorted(lower)}."
    assert not any(moved(module) for module in imported_modules(name)), "A module is imported by its old name."


def test_modules_do_not_import_in_a_circle():
    graph = {name: imported_modules(name) - {name} for name in MODULES}
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph, "These modules import each other, directly or not."
