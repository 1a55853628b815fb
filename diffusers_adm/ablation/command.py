"""`diffusers-adm ablate`."""

import argparse
import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_adm.ablation.tables import SET_BY_TABLES, TABLES, table_variants
from diffusers_adm.data.options import ImageSetOptions
from diffusers_adm.evaluation.commands.sampling_options import add_sampling_options, given_sampling_options
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.options import MAX_BATCH_SIZE, MAX_IMAGES, NEIGHBOUR
from diffusers_adm.options import (
    Check,
    add_examples,
    add_options,
    build_options,
    in_range,
    option,
    options_of,
    text_as,
)
from diffusers_adm.training.options import UNetTrainingOptions
from diffusers_adm.training.output_options import HubOptions


# Options of `train_unet` that this command sets, or that concern a single run.
NOT_SHARED = ("output_dir", "resume_from_checkpoint", "seed", "dry_run", "push_every", "report_to")
TABLE_NUMBERS = {str(number): table for number, table in enumerate(TABLES, start=1)}


@dataclass(frozen=True)
class AblationOptions:
    """Variants, seeds and folder of an ablation."""

    output: Path = option(
        metavar="DIR", help="Folder of the ablation: a new one, or that of an interrupted ablation to continue."
    )
    table: str | None = option(
        None,
        choices=(*TABLES, *TABLE_NUMBERS),
        help="Table of the paper whose rows are the variants: architecture (Table 1), attention_heads (Table 2) or adagn"
        " (Table 3). Either this option or --variants is required.",
    )
    variants: Path | None = option(
        None,
        metavar="FILE",
        help="YAML or JSON file of variants: a table of names, each with the options of train_unet that it changes.",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2),
        help="Seeds. Each variant is trained once with each.",
        check=Check(
            "different numbers that are at least 0",
            lambda seeds: seeds and min(seeds) >= 0 and len(set(seeds)) == len(seeds),
        ),
    )
    dry_run: bool = option(False, help="Print parameters, cost and expected time of the variants without training.")


@dataclass(frozen=True)
class AblationSampleOptions:
    """Samples to draw from each run."""

    num_samples: int = option(2000, help="Number of images per run.", check=in_range(NEIGHBOUR + 1, MAX_IMAGES))
    batch_size: int = option(50, help="Number of images per batch.", check=in_range(1, MAX_BATCH_SIZE))
    labels: str = option(
        "random", metavar="POLICY", help="Labels of the samples: random, balanced, or a file, as for sample."
    )


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ablate`."""
    parser.add_argument(
        "reference",
        type=text_as(),
        metavar="REFERENCE",
        help="Reference batch of make-reference (.npz), or images, as for evaluate. Images of a dataset are converted like the"
        " training images. Required.",
    )
    add_options(parser, AblationOptions, title="ablation")
    add_options(parser, AblationSampleOptions, title="samples")
    add_sampling_options(parser, "sampling", "Arguments of the pipeline's call.")
    add_options(parser, FeatureOptions, title="features")
    add_options(
        parser,
        UNetTrainingOptions,
        without=(*NOT_SHARED, *options_of(HubOptions)),
        title="training",
        only_given=True,
    )
    add_examples(
        parser,
        "diffusers-adm ablate reference.npz --table architecture --output ablation --train_data_dir my_images --resolution 32"
        " --model_channels 40 --channel_mult 1,2,2,2 --norm_num_groups 8 --max_train_steps 5000 --validation_fraction 0.1",
        "diffusers-adm ablate reference.npz --variants variants.yaml --output ablation --config base.yaml --seeds 0,1 --dry_run",
    )


def given_training_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `train_unet` that the command line gives."""
    names = set(options_of(UNetTrainingOptions)) - set(NOT_SHARED)
    return {name: value for name, value in vars(args).items() if name in names}


def base_options(given: dict[str, Any], output: Path) -> UNetTrainingOptions:
    """
    Returns the training options that all runs share.

    Args:
        given: Options that the command line gives. They take precedence over those of `--config` and `--preset`.
        output: Folder of all runs.

    Raises:
        ValueError: If the options contradict each other, or upload to the Hub.
    """
    from diffusers_adm.training.configuration import parse, table_as_words

    words = table_as_words(UNetTrainingOptions, given, "The command line")
    base = parse(UNetTrainingOptions, "diffusers-adm ablate", "", (), [*words, "--output_dir", str(output)])
    if base.hub.push_to_hub:
        raise ValueError(
            "ablate uploads nothing to the Hub, so push_to_hub is not supported. Leave it out of --config."
        )
    return base


def ablate(args: argparse.Namespace) -> None:
    """
    Trains and evaluates each variant with each seed, and writes tables and plots into `--output`.

    Raises:
        ValueError: If a variant cannot be trained or sampled, or samples cannot be compared with the reference.
        KeyboardInterrupt: If a training was asked to stop. The same command continues it.
    """
    options, sampling, features = (
        build_options(cls, args) for cls in (AblationOptions, AblationSampleOptions, FeatureOptions)
    )
    given = given_training_options(args)
    check_source_of_variants(options, given)
    base = base_options(given, options.output)

    from diffusers_adm.ablation.plan import print_ablation_plan, variant_costs
    from diffusers_adm.ablation.runs import AblationSamples, check_runs, plan_runs, read_variants
    from diffusers_adm.ablation.training import run_ablation
    from diffusers_adm.data.datasets import required_class_names
    from diffusers_adm.evaluation.reference import check_extractor
    from diffusers_adm.launch import join_processes
    from diffusers_adm.training.setup import divide_batch, load_training_images, resolve_steps

    check_extractor(args.reference, features.feature_extractor)
    if options.variants is not None:
        variants = read_variants(options.variants)
    else:
        variants = table_variants(TABLE_NUMBERS.get(options.table, options.table), base)
    samples = AblationSamples(
        sampling.num_samples, sampling.batch_size, sampling.labels, args.scheduler, given_sampling_options(args)
    )
    state = join_processes()
    with state.main_process_first():
        images, _ = load_training_images(base, base.classes.class_conditional)
    if base.optimisation.num_epochs is not None:
        planned = copy.copy(base.optimisation)  # the runs divide the batch themselves
        divide_batch(planned, state.num_processes)
        resolve_steps(planned, images.num_images, state.num_processes)
        base.optimisation.max_train_steps = planned.max_train_steps
    names = required_class_names(images) if base.classes.class_conditional else None
    runs = plan_runs(base, variants, options.seeds, options.output)
    unets = check_runs(runs, images.num_images, names, samples)
    costs = variant_costs(unets)
    if options.dry_run:
        print_ablation_plan(runs, unets, costs, samples)
        return
    evaluator = load_evaluator(args.reference, features, base) if state.is_main_process else None
    run_ablation(runs, costs, options.output, samples, evaluator)
    if state.is_main_process:
        print((options.output / "results.md").read_text(encoding="utf-8"))
        print(f"Wrote runs, samples, tables and a plot to {options.output}.")


def check_source_of_variants(options: AblationOptions, given: dict[str, Any]) -> None:
    """Raises a `ValueError` unless the variants have one source, and the command line sets no option that the table sets."""
    if (options.table is None) == (options.variants is None):
        raise ValueError("Exactly one of --table and --variants is required. Pass the one that names the variants.")
    for name in SET_BY_TABLES:
        if options.table is not None and name in given:
            raise ValueError(
                f"--{name} is set by the rows of --table {options.table}. Leave it out, or pass --variants."
            )


def load_evaluator(reference: str, features: FeatureOptions, base: UNetTrainingOptions) -> Any:
    """Loads the extractor and the reference, whose images must have the size and channels of the training images."""
    from diffusers_adm.evaluation.sweep import build_evaluator

    # Options that name the training images must not choose the images of the reference.
    names = ("dataset_name", "train_data_dir", "dataset_config_name", "dataset_revision", "data_files")
    source = replace(base.source, **dict.fromkeys(names))
    images = ImageSetOptions(source=source, format=base.format)
    shape = (base.format.resolution, base.format.resolution, base.format.in_channels)
    return build_evaluator(reference, images, features, shape)
