"""The documents that users read, and the code in them."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "training/*.md", "model_cards/*/README.md")
DOCUMENTS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]

# A comment before a block says why it is not run.
BLOCK = r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```{language}\n(?P<code>.*?)^```"


def blocks_with_reasons(path: Path, language: str) -> list[tuple[str, str | None]]:
    """Returns the fenced blocks of a language in their order. Each has the reason why it is not run, or `None`."""
    pattern = BLOCK.replace("{language}", language)
    found = re.finditer(pattern, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(match["code"], match["reason"]) for match in found]


def code_blocks(path: Path, language: str) -> list[str]:
    """Returns the fenced blocks of a language in their order."""
    return [code for code, _ in blocks_with_reasons(path, language)]
