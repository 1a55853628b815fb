"""`diffusers-adm search-steps`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.evaluation.commands.sampling_options import add_sampling_options, given_sampling_options
from diffusers_adm.evaluation.options import (
    MAX_BATCH_SIZE,
    MAX_CANDIDATES,
    STEP_OPTIONS,
    ModelOptions,
    RunOptions,
)
from diffusers_adm.options import add_examples, add_options, build_options, in_range, option, option_values


@dataclass(frozen=True)
class SearchOptions:
    """Steps to find."""

    output: Path = option(metavar="FILE", help="JSON file to write.")
    num_inference_steps: int = option(
        metavar="INT", help="Number of steps to find.", check=in_range(1, MAX_CANDIDATES)
    )
    num_images: int = option(
        64, help="Number of images whose trajectories are recorded.", check=in_range(1, MAX_BATCH_SIZE)
    )
    num_candidates: int = option(
        100, help="Number of noise levels among which the search chooses.", check=in_range(2, MAX_CANDIDATES)
    )


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `search-steps`."""
    add_options(parser, SearchOptions, title="search")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(parser, "sampling", "Arguments of the pipeline's call.", without=("scheduler", *STEP_OPTIONS))
    add_examples(
        parser,
        "diffusers-adm search-steps --num_inference_steps 6 --output steps.json",
        "diffusers-adm search-steps --model me/my-model --num_inference_steps 8 --guidance_scale 2.5 --output steps.json",
    )


def search_steps_command(args: argparse.Namespace) -> None:
    """
    Prints the best noise levels of few steps and a command that uses them, and writes them into `--output`.

    Raises:
        ValueError: If the file cannot be written, or the pipeline is an upsampler or has a consistency model.
    """
    options, model, run = (build_options(cls, args) for cls in (SearchOptions, ModelOptions, RunOptions))

    from diffusers_adm.atomic_files import check_can_write, write_json
    from diffusers_adm.evaluation.sampling import load_pipeline, model_settings
    from diffusers_adm.evaluation.step_search import search_steps
    from diffusers_adm.launch import join_processes
    from diffusers_adm.records import as_record

    check_can_write(options.output)
    pipeline = load_pipeline(**option_values(model), device=join_processes().device)
    settings = {**option_values(options), **option_values(run)}
    output = settings.pop("output")
    call = {name: value for name, value in given_sampling_options(args).items() if name not in STEP_OPTIONS}
    found = search_steps(pipeline, **settings, call=call)
    command = found.command(model.model, call)
    settings |= {name: model_settings(pipeline, model.model)[name] for name in ("model", "weights")}
    steps = {found.name: found.values, "noise_levels": found.sigmas}
    write_json(output, {**steps, "command": command, "call": as_record(call), **settings})
    print(f"{found.name}: {found.values}")
    print(f"Wrote {output}. This command draws samples with these steps:\n{command}")
