"""Every docstring and every help text begins with a noun or a verb, and no entry is a fragment of another sentence."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("diffusers_adm", "pipelines", "training") for path in (ROOT / folder).rglob("*.py")
)
# Words that continue a sentence which is not there.
FRAGMENTS = (
    "as",
    "at",
    "by",
    "for",
    "from",
    "how",
    "if",
    "in",
    "of",
    "on",
    "once",
    "such",
    "that",
    "those",
    "to",
    "what",
    "when",
    "where",
    "which",
    "with",
    "without",
)
AVOIDED = re.compile(r"\b(lest|to and fro|no more than|none of its own|not one)\b", re.IGNORECASE)
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}[\w*.`, ]+: (.+)$", re.MULTILINE)


def openings(docstring: str) -> list[str]:
    """Returns the first sentence of a docstring, and that of each entry of its sections."""
    beginning, *sections = SECTION.split(docstring)
    bodies = [body for title, body in zip(sections[::2], sections[1::2]) if title != "Raises"]  # which begin with "If"
    return [beginning.strip().split("\n")[0], *(entry for body in bodies for entry in ENTRY.findall(body))]


def help_texts(tree: ast.AST) -> list[str]:
    """Returns the texts of `help=` arguments and of `"help"` entries of metadata."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help":
            found.append(node.value)
        if isinstance(node, ast.Dict):
            found += [value for key, value in zip(node.keys, node.values) if getattr(key, "value", None) == "help"]
    return [node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_begin_with_a_noun_or_a_verb(path):
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    texts = [text for docstring in docstrings for text in openings(docstring)] + help_texts(tree)
    fragments = [text for text in texts if re.split(r"\W", text, maxsplit=1)[0].lower() in FRAGMENTS]
    assert not fragments
    assert not [text for text in [*docstrings, *texts] if AVOIDED.search(text)]
