"""Shared parts of all command lines: errors in one line, exit codes, and parsers that show no usage beside an error."""

import argparse
import contextlib
import difflib
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

from safetensors import SafetensorError


INSTALL_COMMAND = 'pip install -e ".[{extra}]"'
# Extra of each package that is not in the usual ones.
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "gradio": "page",
    "peft": "lora",
    "transformers": "transformers",
}
USUAL_EXTRAS = "train,eval"

# Errors whose message is for the user. All other errors, except those of full memory, are faults of the program.
USER_ERRORS = (ValueError, OSError, SafetensorError)

FULL_MEMORY = "the memory is full: choose a smaller batch size"

MAX_CHARACTERS = 1000  # limit of a message, because some quote a whole file


class RunFailed(RuntimeError):
    """Failure that ends a training run, such as a loss that is not finite. The message gives the reason."""


class UnusableFolder(ValueError):
    """Folder that holds a run with other settings, or cannot be written."""


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Help with a short usage line. Paragraphs fit the terminal, and examples keep their lines, because they are to be copied."""

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        """Adds the usage line, which names the required arguments only."""
        if usage is None and prefix is None:
            required = [action for action in actions if action.required]
            words = [[*action.option_strings[:1], str(action.metavar or action.dest)] for action in required]
            usage = " ".join(["%(prog)s", "[options]", *itertools.chain(*words)])
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n  " in text:
            return super()._fill_text(text, width, indent)
        parts = (" ".join(part.split()) for part in text.split("\n\n"))
        filled = (textwrap.fill(part, width, initial_indent=indent, subsequent_indent=indent) for part in parts)
        return "\n\n".join(filled)


class CommandParser(argparse.ArgumentParser):
    """Parser that reports an error in one line, because the usage of many options would hide it, and takes no shortened options."""

    def __init__(self, *args, formatter_class: type[argparse.HelpFormatter] = CommandHelp, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Parses as `argparse` does, and reports unknown options together with the nearest known one, also for subcommands."""
        parsed, others = super().parse_known_args(args, namespace)
        for name in (word.partition("=")[0] for word in others if word.startswith("--")):
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"there is no option {name}{suggest_nearest(name, known)}")
        return parsed, others

    def error(self, message: str) -> None:
        """Reports an error of the command line, and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_command(name: str, command: Callable[[], None]) -> int:
    """
    Runs a command, and reports an error of the user's input or files in one line.

    Args:
        name: Name of the program, for the message.
        command: Function to run.

    Returns:
        Exit code: 0, 2 if the command failed, or 130 if it was interrupted.
    """
    try:
        with _flushed_output():
            command()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"{name}: error: {describe_missing_package(error)}", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        print(f"{name}: error: {textwrap.shorten(describe_error(error), MAX_CHARACTERS)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        print(f"{name}: error: {FULL_MEMORY}", file=sys.stderr)
        return 2
    return 0


def is_full_memory(error: MemoryError | RuntimeError) -> bool:
    """Returns whether an error says that the memory of the processor or of an accelerator is full."""
    from accelerate.utils.memory import should_reduce_batch_size  # imports torch

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


@contextlib.contextmanager
def noted_failure(name: str, failures: list[str], alone: bool) -> Iterator[None]:
    """
    Prints and lists an error of one part of a long command, so that the other parts go on.

    Args:
        name: Name of the part.
        failures: List that the name is added to.
        alone: Whether there is one process. Otherwise, the error is raised, because the other processes may not have failed and would
            wait for ever.

    Raises:
        UnusableFolder: If the folder of the part cannot be used. The other parts would fail too.
    """
    try:
        yield
    except UnusableFolder:
        raise
    except (ValueError, MemoryError, RuntimeError) as error:
        is_full = not isinstance(error, ValueError) and is_full_memory(error)
        if not alone or not (is_full or isinstance(error, ValueError)):
            raise
        failures.append(name)
        print(f"{name} failed: {FULL_MEMORY if is_full else error}", flush=True)


def describe_missing_package(error: ModuleNotFoundError) -> str:
    """Returns the message about a package that is not installed. Raises the error again if a module of this package is missing."""
    if error.name is None or error.name.partition(".")[0] == "diffusers_adm":
        raise error
    command = INSTALL_COMMAND.format(extra=EXTRAS.get(error.name, USUAL_EXTRAS))
    return f"the package {error.name} is not installed: run {command} in a checkout of the repository of diffusers-adm"


def launched_processes() -> int:
    """Returns the number of processes that `torchrun` or `accelerate launch` has started."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys() else 1


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name, which suggests the nearest known one. It is empty if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {nearest[0]}?" if nearest else ""


def describe_error(error: Exception) -> str:
    """Returns the message of an error for the user, with the name of the file if the error has one."""
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "the program that reads the output has ended"
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _flushed_output() -> Iterator[None]:
    """Writes all output before the exit code is decided. Output that cannot be written is an error."""
    try:
        yield
    finally:
        try:
            print(end="", flush=True)
        except OSError:
            # Python would try again at exit, and fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
