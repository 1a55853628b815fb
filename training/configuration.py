"""Conversion of options between the command line, configuration files, presets, checkpoints and model cards."""

import argparse
import signal
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffusers_adm.command_line import (
    CommandParser,
    RunFailed,
    describe_missing_package,
    is_full_memory,
    suggest_nearest,
)
from diffusers_adm.options import OptionInfo, add_examples, add_options, build_options, option_values, options_of
from diffusers_adm.quiet import hide_bars_in_logs
from diffusers_adm.training.checkpoint_folders import list_checkpoints
from diffusers_adm.training.options import TrainingOptions


Options = TypeVar("Options", bound=TrainingOptions)
# Options that name the model that training starts from.
START_OPTIONS = ("pretrained_model_name_or_path", "pretrained_subfolder", "pretrained_flags")
# Options that only the script of one kind of model has.
KIND_OPTIONS = {"pool": "classifier", "low_resolution": "upsampler", "noise_embedding": "consistency"}


def parse(
    options: type[Options],
    program: str,
    description: str,
    examples: tuple[str, ...],
    argv: list[str] | None = None,
) -> Options:
    """
    Parses the command line of a script. The command line takes precedence over `--config`, which takes precedence over `--preset`.

    Args:
        options: Options of the script.
        program: Words that run the script, for the usage line.
        description: Description for the help.
        examples: Command lines for the help.
        argv: Words of the command line. `None` means those of the process.

    Raises:
        ValueError: If a configuration file is not a table of options, or the options contradict each other.
    """
    parser = CommandParser(prog=program, description=description)
    add_options(parser, options, title="run")
    add_examples(parser, *examples)
    argv = sys.argv[1:] if argv is None else argv
    words = [*configured_words(options, argv), *argv]
    args = parser.parse_args(words)
    lengths = [name for word in words if (name := word.partition("=")[0]) in ("--num_epochs", "--max_train_steps")]
    if lengths and lengths[-1] == "--max_train_steps":  # the later of the two wins, like a repeated option
        args.num_epochs = None
    if args.max_train_steps is None and args.num_epochs is None:
        parser.error(
            "one of --max_train_steps and --num_epochs is required, on the command line, in --config or in --preset"
        )
    return build_options(options, args)


def configured_words(options: type[TrainingOptions], argv: list[str]) -> list[str]:
    """
    Returns the options of the preset and of the configuration file that a command line names, as words of a command line. If nothing
    says the architecture, they begin with the options of the model that training starts from, or of the run that is resumed.

    Raises:
        ValueError: If a file is not a table of the script's options, or the model to start from or the checkpoint to resume cannot be
            read.
    """
    words = _preset_and_config_words(options, argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("model_channels", "resolution", "output_dir", "resume_from_checkpoint", *START_OPTIONS):
        parser.add_argument(f"--{name}", nargs="?")  # the script's own parser reports missing values
    parser.add_argument("-h", "--help", action="store_true")
    given, _ = parser.parse_known_args([*words, *argv])
    if given.pretrained_model_name_or_path is None or given.model_channels is not None or given.help:
        return words
    from diffusers_adm.training.pretrained_options import FOLLOWING, options_of_pretrained  # slow to import

    known = options_of(options)
    start = [getattr(given, name) for name in START_OPTIONS]
    resolution = int(given.resolution) if (given.resolution or "").isdecimal() else None
    resumed = _options_of_resumed_run(given.output_dir, given.resume_from_checkpoint)
    if resumed is None:
        kind = next((kind for option, kind in KIND_OPTIONS.items() if option in known), "unet")
        table = options_of_pretrained(kind, *start, resolution)
    else:
        table = {name: value for name, value in resumed.items() if name in FOLLOWING and name in known}
    return as_words(options, yaml.safe_dump(table), f"--pretrained_model_name_or_path {start[0]}") + words


def _options_of_resumed_run(output_dir: str | None, resume_from_checkpoint: str | None) -> dict[str, Any] | None:
    """Returns the options of the checkpoint that a run resumes from, because the model that it started from may be gone."""
    folder = resume_from_checkpoint
    if folder == "latest":
        folder = next(reversed(list_checkpoints(Path(output_dir or ""))), None)
    if folder is None:
        return None
    file = Path(folder) / "options.yaml"
    if not file.is_file():
        raise ValueError(f"--resume_from_checkpoint must be the folder of a checkpoint, but there is no file {file}.")
    return read_table(file.read_text(), str(file))


def _preset_and_config_words(options: type[TrainingOptions], argv: list[str]) -> list[str]:
    known, parser = options_of(options), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.set_defaults(preset=None)
    if "preset" in known:
        parser.add_argument("--preset", nargs="?")
    parser.add_argument("--config", type=Path, nargs="?")
    sources, _ = parser.parse_known_args(argv)
    config, preset, table = [], sources.preset, {}
    if sources.config is not None:
        if not sources.config.is_file():
            raise ValueError(f"--config must be a file, but there is no such file: {sources.config}")
        source = f"--config {sources.config}"
        table = read_table(sources.config.read_text(), source)
        config = table_as_words(options, table, source)
        preset = preset or parser.parse_known_args(config)[0].preset
    if preset is None or preset not in known["preset"].choices:  # the script's own parser refuses unknown ones
        return config
    recipe = resources.files("diffusers_adm.training") / "presets" / f"{preset}.yaml"
    source = f"--preset {preset}"
    # Entries of the configuration take precedence, also those that are null or false and become no words.
    kept = {name: value for name, value in read_table(recipe.read_text(), source).items() if name not in table}
    return table_as_words(options, kept, source) + config


def as_words(options: type[TrainingOptions], text: str, source: str) -> list[str]:
    """
    Converts a YAML table to words of a command line, so that both are checked in the same way.

    Args:
        options: Options of the script.
        text: Table in YAML.
        source: Origin of the table, for error messages.

    Raises:
        ValueError: If the text is not a table of options of the script.
    """
    return table_as_words(options, read_table(text, source), source)


def table_as_words(options: type[TrainingOptions], table: dict[str, Any], source: str) -> list[str]:
    """
    Converts a table of options to words of a command line.

    Args:
        options: Options of the script.
        table: Values by the names of the options. `None` is left out.
        source: Origin of the table, for error messages.

    Raises:
        ValueError: If there is no such option, or a value is of another type.
    """
    known, words = options_of(options), []
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{source}: there is no option {name!r}{suggest_nearest(str(name), known)}")
        if isinstance(value, bool):
            if not known[name].is_switch:
                raise ValueError(f"{source}: {name} takes a value. Put quotes around yes, no, on and off.")
            if value or known[name].negatable:
                words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            words += (
                [f"--{name}", *map(str, value)] if known[name].takes_several_words else [f"--{name}={joined(value)}"]
            )
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


class _LoaderWithoutAliases(yaml.SafeLoader):
    """Loader that refuses aliases, because a few lines with aliases can expand to more values than fit in memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "found an alias in place of a value", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def read_table(text: str, source: str) -> dict[str, Any]:
    """
    Reads a YAML table of options.

    Args:
        text: Table in YAML.
        source: Origin of the table, for error messages.

    Raises:
        ValueError: If the text is not a single YAML table without aliases.
    """
    try:
        table = yaml.load(text, _LoaderWithoutAliases)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{source} is not a table of options and values: {reason}{place}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{source} is not a table of options and values.")
    return table


def joined(values: list | tuple) -> str:
    """Joins values by commas, which is the form of tuples on a command line."""
    return ",".join(map(str, values))


def as_yaml(options: TrainingOptions) -> str:
    """Returns all options but the token of the Hub, as text of a file for `--config`."""
    known = options_of(type(options))
    values = {name: value for name, value in option_values(options).items() if known[name].notes.get("saved", True)}
    return yaml.safe_dump({name: _plain(value) for name, value in values.items()}, sort_keys=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def as_command_line(options: TrainingOptions) -> list[str]:
    """Returns parts of a command line for all options that model cards show."""
    known, parts = options_of(type(options)), []
    values = yaml.safe_load(as_yaml(options))
    for name, value in values.items():
        if value is None or not _is_on_card(known[name], values):
            continue
        if isinstance(value, bool):
            if value or known[name].default is True:
                parts.append(f"--{name}" if value else f"--no-{name}")
        else:
            text = joined(value) if isinstance(value, list) else str(value)
            # Without "=", argparse would take -1024,3071 for an option.
            parts.append(f"--{name}={text}" if text.startswith("-") else f"--{name} {text}")
    return parts


def _is_on_card(option: OptionInfo, values: dict[str, Any]) -> bool:
    shown = option.notes.get("on_card", not option.notes.get("resumable", False))
    return shown(values) if callable(shown) else shown


def contradictions(options: TrainingOptions, text: str, exact: bool = False) -> list[str]:
    """
    Returns the options that differ from those of an interrupted run but must be the same.

    Args:
        options: Options of the resumed run.
        text: Content of `options.yaml` of the interrupted run. Options that it lacks are not compared.
        exact: Whether options that a resumed run may change must be the same too, if model cards show them.

    Raises:
        ValueError: If the text is not a table of options.
    """
    now, then = yaml.safe_load(as_yaml(options)), read_table(text, "options.yaml")
    known = options_of(type(options))
    return [
        f"--{name} {now[name]} (was {then[name]})"
        for name in now
        if name in then
        and now[name] != then[name]
        and not (_may_differ(known[name], now) and not (exact and _is_on_card(known[name], now)))
    ]


def _may_differ(option: OptionInfo, values: dict[str, Any]) -> bool:
    resumable = option.notes.get("resumable", False)
    return resumable(values) if callable(resumable) else resumable


def run_script(main: Callable[[Options], None], parse_args: Callable[[], Options]) -> None:
    """
    Entry point of a training script. Reports invalid input, a full disk, full memory, a missing package and a failed run in one line
    instead of a traceback.
    """
    hide_bars_in_logs()
    try:
        main(parse_args())
        from diffusers_adm.launch import join_processes  # here, because the help does without torch

        join_processes().destroy_process_group()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {describe_missing_package(error)}")
    except (ValueError, OSError, RunFailed) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except (MemoryError, RuntimeError) as error:
        if not is_full_memory(error):
            raise
        sys.exit(
            "error: the memory is full. Pass a smaller --train_batch_size with the same --total_batch_size, or --gradient_checkpointing."
        )
    except KeyboardInterrupt:
        print(
            "error: interrupted. Pass --resume_from_checkpoint latest to continue from the last checkpoint.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
