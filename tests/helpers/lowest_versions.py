"""Prints the lowest version of each dependency that the package claims to work with, as words for pip: `make test-lowest`."""

import re
from importlib.metadata import requires


def lowest_versions() -> list[str]:
    """The requirements of the package and its extras, without those that `make test-lowest` does not install."""
    left_out = re.compile(r"extra == .(docs|export|notebooks|page|test-page)\b")
    words = [requirement for requirement in requires("diffusers-adm") if not left_out.search(requirement)]
    return sorted({word.partition(";")[0].strip().replace(">=", "==") for word in words})


if __name__ == "__main__":
    print(*lowest_versions())
