"""Command line of sampling and evaluation: the options of its commands, and the functions that the commands run."""

import argparse
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard

from diffusers_adm.atomic_files import write_json
from diffusers_adm.data.image_sets import ImageSetOptions, open_images
from diffusers_adm.evaluation.likelihood import evaluate_likelihood
from diffusers_adm.evaluation.metrics import check_shape, compare, summarise
from diffusers_adm.evaluation.options import FeatureOptions, ModelOptions, RunOptions, load_extractor
from diffusers_adm.evaluation.precision_recall import NEIGHBOUR
from diffusers_adm.evaluation.reference import summarise_reference, write_reference
from diffusers_adm.evaluation.report import add_to_card
from diffusers_adm.evaluation.sample_files import FORMATS
from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
from diffusers_adm.evaluation.schedulers import SCHEDULERS, set_scheduler
from diffusers_adm.evaluation.sweep import PointEvaluator, sweep_points
from diffusers_adm.launch import join_processes
from diffusers_adm.options import add_examples, add_options, build_options, option_values
from diffusers_adm.pipelines.options import SamplingOptions


NO_DATASET = ("dataset_name", "train_data_dir")  # the commands take the dataset as an argument


def parse_value(text: str) -> bool | float | int | str | list | dict | None:
    """Parses a word of the command line: a number, true, false, none, a list or an object in JSON, or else a text."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def option_type(name: str) -> Callable[[str], object]:
    """Returns the parser of a call's argument: respacing strings may look like numbers."""
    return str if name == "timestep_respacing" else parse_value


def add_sampling_options(
    parser: argparse.ArgumentParser, title: str, description: str, nargs: str | None = None
) -> None:
    """
    Adds the arguments of the pipelines' calls that hold for a whole run.

    Args:
        parser: Parser to add to.
        title: Heading of the options.
        description: Sentence below the heading.
        nargs: `"+"` for several values of each option.
    """
    group = parser.add_argument_group(title, description)
    group.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        default=None if nargs is None else [None],
        nargs=nargs,
        help="Scheduler, instead of the pipeline's. -guided: as its authors advise for guided sampling; -Karras: with the noise"
        " levels of Karras et al. 2022.",
    )
    for name, text in SamplingOptions.recorded().items():
        group.add_argument(
            f"--{name}", type=option_type(name), nargs=nargs, default=argparse.SUPPRESS, metavar="VALUE", help=text
        )


def given_sampling_options(args: argparse.Namespace) -> dict:
    """Returns the options of `add_sampling_options` that the command line gives, except for the scheduler."""
    return {name: getattr(args, name) for name in SamplingOptions.recorded() if hasattr(args, name)}


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: a new one, or of a run to continue."
    )
    parser.add_argument(
        "--num_samples", metavar="INT", type=int, default=50_000, help="Number of images. Default: 50000."
    )
    parser.add_argument(
        "--labels",
        metavar="POLICY",
        help="random, balanced, or a file: .npz with arr_1, or a text of one number or name per line. Default: random, and for"
        " an upsampler the labels of --low_res, or no labels if there are none.",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="npz", help="npz: one file; png: one folder per class. Default: npz."
    )
    parser.add_argument(
        "--remove_shards", action="store_true", help="Delete the shards after the samples have been written."
    )
    parser.add_argument(
        "--low_res", metavar="FILE", help="Samples (.npz), with their labels, that an upsampler enlarges."
    )
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(
        parser, "sampling", "Arguments of the pipeline's call. Its own defaults apply to those that are not given."
    )
    add_examples(
        parser,
        "diffusers-adm sample --output samples --num_samples 1000 --scheduler DDIM --num_inference_steps 25",
        "diffusers-adm sample --model me/my-model --output samples --labels balanced --guidance_scale 2.5",
    )


def sample(args: argparse.Namespace) -> None:
    """
    Draws samples into `--output`: `samples_NxHxWxC.npz` as the published scripts write it, or PNG files, and a grid.

    Raises:
        ValueError: If the run is impossible, or the folder belongs to a run of other settings.
    """
    state = join_processes()
    model, run = build_options(ModelOptions, args), build_options(RunOptions, args)
    pipeline = load_pipeline(**option_values(model), device=state.device, upsampler=args.low_res is not None)
    set_scheduler(pipeline, args.scheduler)
    folder = Path(args.output)
    path = draw_samples(
        pipeline,
        folder,
        num_images=args.num_samples,
        **option_values(run),
        labels=args.labels,
        call=given_sampling_options(args),
        low_res=args.low_res,
        model_name=model.model,
        format=args.format,
    )
    if state.is_main_process:
        if args.remove_shards:
            shutil.rmtree(folder / "shards")
        print(f"{args.num_samples} samples in {path}")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate`."""
    parser.add_argument("reference", help="Reference batch (.npz), or the images themselves, as for the samples.")
    parser.add_argument("samples", help=".npz with arr_0, folder of images, or dataset.")
    parser.add_argument(
        "--samples_split", metavar="TEXT", default="train", help="Split of a dataset of samples. Default: train."
    )
    parser.add_argument("--output", metavar="FILE", help="JSON file to write the metrics to.")
    parser.add_argument(
        "--model_card", metavar="FILE", help="Model card, README.md, to write the metrics to as EvalResults."
    )
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm evaluate reference.npz samples/samples_50000x64x64x3.npz --output metrics.json",
        "diffusers-adm evaluate reference.npz my_pictures --resolution 64 --feature_extractor vgg16",
    )


def evaluate(args: argparse.Namespace) -> None:
    """
    Evaluates samples against a reference, and prints the metrics.

    Raises:
        ValueError: If the two cannot be compared.
    """
    # Quick checks come first, so that a mistake shows before features are extracted.
    images = build_options(ImageSetOptions, args)
    images.check(args.samples, args.reference)
    if args.model_card is not None and not Path(args.model_card).is_file():
        raise ValueError(f"--model_card {args.model_card} is no file.")
    card = None if args.model_card is None else ModelCard.load(args.model_card)
    if args.output is not None and not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no such folder.")
    # Samples have the small size already.
    format = dataclasses.replace(images.format, source_resolution=None)
    samples = open_images(args.samples, dataclasses.replace(images, split=args.samples_split, format=format))
    if samples.num_images <= NEIGHBOUR:
        raise ValueError(
            f"{args.samples} has {samples.num_images} images; precision and recall need more than {NEIGHBOUR}, and"
            " figures that mean something thousands."
        )
    features = build_options(FeatureOptions, args)
    extractor, batch_size = load_extractor(features), features.feature_batch_size
    reference = summarise_reference(args.reference, extractor, images, batch_size)
    check_shape(reference, samples.shape)
    evaluation = compare(reference, summarise(samples, extractor, batch_size), extractor.name)
    print(evaluation.table())
    if args.output is not None:
        write_json(Path(args.output), evaluation.as_dict())
    if card is not None:
        add_to_card(card, evaluation, Path(args.model_card))


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `make_reference`."""
    parser.add_argument("dataset", help="Hub id, folder of images, dataset's folder, or .npz with arr_0.")
    parser.add_argument("output", help=".npz file to write.")
    parser.add_argument(
        "--num_neighbours",
        metavar="INT",
        type=int,
        default=10_000,
        help="Number of images in the file, for precision and recall. Statistics are of all images. Default: 10000.",
    )
    parser.add_argument("--seed", metavar="INT", type=int, default=0, help="Seed of their choice. Default: 0.")
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm make-reference my_images reference.npz --resolution 64",
        "diffusers-adm make-reference ylecun/mnist reference.npz --split test --resolution 32 --crop pad",
    )


def make_reference(args: argparse.Namespace) -> None:
    """
    Writes a reference batch: statistics of all images of a dataset, and some of the images.

    Raises:
        ValueError: If the images cannot be used, or the file exists.
    """
    output = Path(args.output)
    if output.suffix != ".npz" or output.exists() or not output.parent.is_dir():
        raise ValueError(f"{output} must be a new .npz file in a folder that exists.")
    options, features = build_options(ImageSetOptions, args), build_options(FeatureOptions, args)
    options.check(args.dataset)
    images = open_images(args.dataset, options)
    if args.num_neighbours <= NEIGHBOUR:
        raise ValueError(f"--num_neighbours {args.num_neighbours}: precision and recall need more than {NEIGHBOUR}.")
    count = write_reference(
        output,
        images,
        load_extractor(features),
        num_neighbours=args.num_neighbours,
        seed=args.seed,
        batch_size=features.feature_batch_size,
        metadata={
            "dataset": str(args.dataset) if not Path(args.dataset).exists() else Path(args.dataset).name,
            "split": None if Path(args.dataset).suffix == ".npz" else options.split,
            "crop": options.format.crop if options.format.resolution is not None else None,
            "source_resolution": options.format.source_resolution,
        },
    )
    print(f"Wrote statistics of {images.num_images} images, and {count} of them, to {output}")


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `nll`."""
    parser.add_argument("dataset", help="Hub id, folder of images, dataset's folder, or .npz with arr_0.")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: a new one, or of a run to continue."
    )
    parser.add_argument(
        "--num_images", metavar="INT", type=int, help="Number of images, the first ones. All by default."
    )
    parser.add_argument(
        "--timestep_respacing",
        metavar="TEXT",
        default="",
        help="Steps of the process as a published string. All by default.",
    )
    parser.add_argument("--unconditional", action="store_true", help="Give the UNet its null class for all images.")
    parser.add_argument(
        "--clip_denoised",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Clip the predicted x_0 to [-1, 1]. On by default.",
    )
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm nll my_images --resolution 64 --model me/my-model --output likelihood",
        "diffusers-adm nll images.npz --model me/my-model --timestep_respacing 250 --num_images 1000 --output likelihood",
    )


def nll(args: argparse.Namespace) -> None:
    """
    Computes a model's variational bound on a dataset, on all processes of a launch.

    Raises:
        ValueError: If model and images do not fit together, or the folder belongs to a run of other settings.
    """
    options, model = build_options(ImageSetOptions, args), build_options(ModelOptions, args)
    options.check(args.dataset)
    pipeline = load_pipeline(**option_values(model), device=join_processes().device)
    labelled = pipeline.unet.config.num_class_embeds is not None and not args.unconditional
    evaluate_likelihood(
        pipeline,
        open_images(args.dataset, options, labelled),
        Path(args.output),
        num_images=args.num_images,
        timestep_respacing=args.timestep_respacing,
        unconditional=args.unconditional,
        clip_denoised=args.clip_denoised,
        **option_values(build_options(RunOptions, args)),
        model_name=model.model,
        image_settings=option_values(options.format),
    )


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sweep`."""
    parser.add_argument("reference", help="Reference batch (.npz), or images, as for evaluate.")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the sweep: a new one, or of a sweep to continue."
    )
    parser.add_argument(
        "--num_samples", metavar="INT", type=int, default=2000, help="Number of images per point. Default: 2000."
    )
    parser.add_argument("--labels", metavar="POLICY", default="random", help="Labels, as for sample. Default: random.")
    parser.add_argument("--low_res", metavar="FILE", help="Samples that an upsampler enlarges, as for sample.")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_sampling_options(
        parser,
        "points",
        "One value or more of each. Every combination is a point. The pipeline's defaults apply to those that are not given.",
        nargs="+",
    )
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET)
    add_examples(
        parser,
        "diffusers-adm sweep reference.npz --output sweep --guidance_scale 0 1 2.5 5",
        "diffusers-adm sweep reference.npz --model me/my-model --output sweep --scheduler DDIM DDPM --num_inference_steps 25 50",
    )


def sweep(args: argparse.Namespace) -> None:
    """
    Draws and evaluates samples at each point, and writes tables and plots into `--output`.

    Raises:
        ValueError: If a point cannot be drawn, or compared with the reference.
    """
    images, features = build_options(ImageSetOptions, args), build_options(FeatureOptions, args)
    images.check(args.reference)
    state = join_processes()
    model, folder = build_options(ModelOptions, args), Path(args.output)
    pipeline = load_pipeline(**option_values(model), device=state.device, upsampler=args.low_res is not None)
    evaluator = None
    if state.is_main_process:
        extractor = load_extractor(features)
        reference = summarise_reference(args.reference, extractor, images, features.feature_batch_size)
        config = pipeline.unet.config
        check_shape(reference, (config.sample_size, config.sample_size, config.in_channels))
        evaluator = PointEvaluator(reference, extractor, features.feature_batch_size)
    sweep_points(
        pipeline,
        {"scheduler": args.scheduler, **given_sampling_options(args)},
        folder,
        evaluator,
        num_images=args.num_samples,
        **option_values(build_options(RunOptions, args)),
        labels=args.labels,
        low_res=args.low_res,
        model_name=model.model,
    )
    if state.is_main_process:
        print((folder / "results.md").read_text(encoding="utf-8"))
