"""Prints the lowest version of each dependency that the package claims to work with, as words for pip: `make test-lowest`."""

from importlib.metadata import requires


def lowest_versions() -> list[str]:
    """The requirements of the package and its extras, without those of the documentation."""
    words = [requirement for requirement in requires("diffusers-adm") if 'extra == "docs"' not in requirement]
    return sorted({word.partition(";")[0].strip().replace(">=", "==") for word in words})


if __name__ == "__main__":
    print(*lowest_versions())
