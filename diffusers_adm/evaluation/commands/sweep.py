"""`diffusers-adm sweep`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.data.options import NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.commands.sampling_options import add_sampling_options, given_sampling_options
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.options import MAX_IMAGES, NEIGHBOUR, ModelOptions, RunOptions
from diffusers_adm.options import add_examples, add_options, build_options, in_range, option, option_values, text_as


@dataclass(frozen=True)
class SweepOptions:
    """Samples to draw at each point."""

    output: Path = option(metavar="DIR", help="Folder of the sweep: a new one, or that of a sweep to continue.")
    num_samples: int = option(2000, help="Number of images per point.", check=in_range(NEIGHBOUR + 1, MAX_IMAGES))
    labels: str | None = option(
        None,
        metavar="POLICY",
        help="Labels of the samples: random, balanced, or a file, as for sample.",
        unset="random for a base model, and the labels of --low_res, if any, for an upsampler",
    )
    low_res: Path | None = option(
        None, metavar="FILE", help="Small samples (.npz) that an upsampler enlarges, as for sample."
    )
    judged: bool = option(
        False,
        help="Also print accuracy: the fraction of samples that show the requested class, by a feature extractor that is a classifier"
        " of the same classes. Points without requested classes have none.",
    )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sweep`."""
    parser.add_argument(
        "reference",
        type=text_as(),
        metavar="REFERENCE",
        help="Reference batch of make-reference (.npz), or images, as for evaluate. Required.",
    )
    add_options(parser, SweepOptions, title="samples")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(
        parser,
        "points",
        "Arguments of the pipeline's call, each with one value or more. Every combination of values is a point.",
        nargs="+",
    )
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")
    add_examples(
        parser,
        "diffusers-adm sweep reference.npz --output sweep --guidance_scale 0 1 2.5 5",
        "diffusers-adm sweep reference.npz --model me/my-model --output sweep --scheduler DDIM DDPM --num_inference_steps 25 50",
    )


def sweep(args: argparse.Namespace) -> None:
    """
    Draws and evaluates samples at each point, and writes tables and plots into `--output`.

    Raises:
        ValueError: If the samples of a point cannot be drawn, or cannot be compared with the reference.
    """
    images, features = build_options(ImageSetOptions, args), build_options(FeatureOptions, args)
    options, model, run = (build_options(cls, args) for cls in (SweepOptions, ModelOptions, RunOptions))
    images.check(args.reference)

    from diffusers_adm.evaluation.reference import check_extractor
    from diffusers_adm.evaluation.sampling import image_shape, load_pipeline
    from diffusers_adm.evaluation.sweep import build_evaluator, check_points, sweep_points
    from diffusers_adm.launch import join_processes

    check_extractor(args.reference, features.feature_extractor)
    state = join_processes()
    pipeline = load_pipeline(**option_values(model), device=state.device, upsampler=options.low_res is not None)
    axes = {"scheduler": args.scheduler, **given_sampling_options(args)}
    drawing = {
        "num_images": options.num_samples,
        **option_values(run),
        "labels": options.labels,
        "low_res": options.low_res,
        "model_name": model.model,
    }
    check_points(pipeline, axes, options.judged, **drawing)  # before the features of the reference, which take long
    evaluator = None
    if state.is_main_process:
        evaluator = build_evaluator(args.reference, images, features, image_shape(pipeline), options.judged)
    sweep_points(pipeline, axes, options.output, evaluator, **drawing)
    if state.is_main_process:
        print((options.output / "results.md").read_text(encoding="utf-8"))
        print(f"Wrote samples, tables and plots to {options.output}.")
