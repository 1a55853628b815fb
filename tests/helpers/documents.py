"""The documents that users read, and the code in them."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PATTERNS = ("README.md", "docs/**/*.md", "training/*.md", "model_cards/*/README.md")
DOCUMENTS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
