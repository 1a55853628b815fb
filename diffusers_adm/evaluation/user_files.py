"""Python files of the user: feature extractors and guidance functions."""

import hashlib
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.guidance import GuidanceFunction


def run_file(path: str | Path, option: str) -> dict[str, Any]:
    """
    Runs a Python file, and returns its names. The file can import modules from its folder, as a script can.

    Args:
        path: Path of the file.
        option: Option that gives the path, for error messages.

    Raises:
        ValueError: If the file does not exist, or raises an error.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{option} must be a Python file, but there is no file {path}.")
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # code of the user may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        raise ValueError(f"{option} {path} failed{place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)


def guidance_from_file(place: str, pipeline: SamplingPipeline) -> GuidanceFunction:
    """
    Returns a guidance function of a Python file.

    Args:
        place: `"FILE:NAME"`, where `NAME(pipeline)` returns the guidance function.
        pipeline: Pipeline that it guides.

    Raises:
        ValueError: If there is no such file or function, or an error is raised.
    """
    path, name = split_place(place)
    build = run_file(path, "--guidance_fn").get(name)
    if not callable(build):
        raise ValueError(f"--guidance_fn must name a function of the file, but {path} has no function {name!r}.")
    try:
        guidance_fn = build(pipeline)
    except Exception as error:
        raise ValueError(f"--guidance_fn {place} failed: {type(error).__name__}: {error}") from error
    if not callable(guidance_fn):
        raise ValueError(
            f"--guidance_fn must name a function that returns a guidance function, but {place} returned {guidance_fn!r}."
        )
    return guidance_fn


def place_record(place: str) -> dict[str, str]:
    """Returns the record of a guidance function in the settings of a run: file, name, and the SHA-256 of the file."""
    path, name = split_place(place)
    return {"file": path.name, "name": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def split_place(place: str) -> tuple[Path, str]:
    """Splits `"FILE:NAME"` at its last colon."""
    path, _, name = place.rpartition(":") if isinstance(place, str) else ("", "", "")
    if not (path and name.isidentifier()):
        raise ValueError(f"--guidance_fn must be FILE.py:NAME, but got {place!r}.")
    return Path(path), name
