"""The command line, in this process."""

from pathlib import Path

from diffusers_adm.cli import main


def run(*words: str | Path | float) -> int:
    """Runs `diffusers-adm` with some words; its exit code."""
    return main([str(word) for word in words])
