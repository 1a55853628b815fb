"""Sphinx extension that reads docstrings in the manner of diffusers, which are Markdown.

Sphinx reads docstrings as reStructuredText. Code spans therefore become literals, and references such as [`~package.Name`] become
cross-references. Characters that only reStructuredText would interpret are escaped.
"""

import re

from sphinx.application import Sphinx


SPAN = re.compile(r"\[`(?P<name>[~!]?[\w.]+)`\]|`(?P<code>[^`]+)`")
SPECIAL = re.compile(r"[\\*|]|(?<=\w)_(?!\w)")


def convert(text: str) -> str:
    """Returns a docstring in reStructuredText."""
    parts, end = [], 0
    for span in SPAN.finditer(text):
        parts.append(SPECIAL.sub(r"\\\g<0>", text[end : span.start()]))
        # A leading dot finds the name in any module. Names without a page of their own are shown as literals.
        name = (span["name"] or "").lstrip("~!")
        parts.append(f":py:obj:`~.{name}`" if name else f"``{span['code'].strip()}``")
        end = span.end()
    return "".join([*parts, SPECIAL.sub(r"\\\g<0>", text[end:])])


def convert_lines(app: Sphinx, kind: str, name: str, target: object, options: object, lines: list[str]) -> None:
    """Converts the lines of a docstring in place."""
    lines[:] = convert("\n".join(lines)).split("\n")


def setup(app: Sphinx) -> dict:
    """Converts docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", convert_lines, priority=400)
    return {"parallel_read_safe": True}
