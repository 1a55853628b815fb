"""The trade-off between fidelity and diversity: metrics over guidance scales, steps, schedulers (Dhariwal & Nichol 2021,
arXiv 2105.05233, section 4.3 and Table 4)."""

import argparse
import csv
import hashlib
import itertools
import json
from pathlib import Path

import torch

from diffusers_adm.atomic_files import atomic_write, write_json
from diffusers_adm.evaluation.features import FeatureExtractor
from diffusers_adm.evaluation.image_sets import NpzImages, add_image_set_arguments, check_changes
from diffusers_adm.evaluation.metrics import (
    METRICS,
    Summary,
    add_extractor_arguments,
    check_shape,
    compare,
    extractor_from,
    metric_label,
    summarise,
    summarise_reference,
)
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.sampling import (
    SCHEDULERS,
    add_model_arguments,
    call_options,
    draw_samples,
    load_pipeline,
    option_type,
    set_scheduler,
)
from diffusers_adm.evaluation.shards import weights_digest
from diffusers_adm.launch import join_processes


PLOTTED = ("frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sweep`."""
    parser.add_argument("reference", help="Reference batch (.npz), or images, as of evaluate.")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the sweep: new, or of one to go on with."
    )
    parser.add_argument("--num_samples", type=int, default=2000, help="Of each point (default: %(default)s).")
    parser.add_argument("--labels", default="random", help="As of sample.")
    parser.add_argument("--low_res", metavar="FILE", default=None, help="As of sample.")
    add_model_arguments(parser)
    group = parser.add_argument_group(
        "points", "One value or more of each; every combination is a point. Where not given, the pipeline's own."
    )
    group.add_argument("--scheduler", nargs="+", choices=sorted(SCHEDULERS), default=[None])
    for name in call_options():
        group.add_argument(f"--{name}", nargs="+", type=option_type(name), default=argparse.SUPPRESS, metavar="VALUE")
    add_extractor_arguments(parser)
    add_image_set_arguments(parser)


def sweep(args: argparse.Namespace) -> None:
    """
    Draws and measures samples at each point, and writes `results.csv`, `results.md`, `results.json` and the paper's plots
    into `args.output`. Points that were measured already are not measured again; all processes of a launch draw.

    Args:
        args: Parsed `add_sweep_arguments`.

    Raises:
        ValueError: If a point cannot be drawn, or measured against the reference.
    """
    check_changes(args, args.reference)
    state = join_processes()
    folder = Path(args.output)
    axes = {"scheduler": args.scheduler}
    axes |= {name: getattr(args, name) for name in call_options() if hasattr(args, name)}
    pipeline = load_pipeline(args, state.device)
    stock_scheduler = pipeline.scheduler
    if args.scheduler == [None]:
        axes["scheduler"] = [type(stock_scheduler).__name__.removesuffix("Scheduler")]
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    if state.is_main_process:
        extractor = extractor_from(args)
        reference = summarise_reference(args.reference, extractor, args, args.feature_batch_size)
        config = pipeline.unet.config
        check_shape(reference, (config.sample_size, config.sample_size, config.in_channels))
    results = []
    for number, point in enumerate(points):
        if state.is_main_process:
            print(f"Point {number + 1} of {len(points)}: {described(point)}", flush=True)
        pipeline.scheduler = stock_scheduler
        set_scheduler(pipeline, point["scheduler"])
        samples = draw_samples(
            pipeline,
            folder / "points" / folder_name(point),
            num_images=args.num_samples,
            batch_size=args.batch_size,
            seed=args.seed,
            labels=args.labels,
            call={name: value for name, value in point.items() if name != "scheduler"},
            low_res=args.low_res,
            model_name=args.model,
        )
        if state.is_main_process:
            results.append({"point": point, **measure(samples, reference, extractor, args.feature_batch_size)})
            write_tables(folder, results)
        state.wait_for_everyone()
    if state.is_main_process:
        plot(folder / "trade-off.png", results, axes)
        print((folder / "results.md").read_text(encoding="utf-8"))


def folder_name(point: dict) -> str:
    """Of a point: readable, and its own."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
    return f"{'_'.join(str(value).replace('/', '-') for value in point.values())[:80]}_{digest}"


def described(point: dict) -> str:
    """A point in words."""
    return ", ".join(f"{name} {value}" for name, value in point.items())


def measure(
    samples: Path, reference: Summary, extractor: FeatureExtractor, batch_size: int, judged: bool = False
) -> dict:
    """
    The metrics of a point's samples; those beside them are taken if they are of the same reference and extractor.

    Args:
        samples: `.npz` file.
        reference: To measure against.
        extractor: Of features.
        batch_size: Images at once.
        judged: Whether to count the samples whose label is the extractor's most likely class, as `"accuracy"`.
    """
    kept = samples.with_name(f"metrics_{samples.stem}.json")
    digest = hashlib.sha256(reference.gaussian.mean.tobytes() + reference.gaussian.covariance.tobytes())
    if reference.features is not None:
        digest.update(reference.features.pooled.cpu().numpy().tobytes())
    key = {
        "feature_extractor": extractor.name,
        "weights": weights_digest({"extractor": extractor.network}),
        "reference": digest.hexdigest(),
        "judged": judged,
    }
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found
    images = NpzImages(samples, labelled=judged)
    summary = summarise(images, extractor, batch_size)
    found = {**compare(reference, summary, extractor.name).as_dict(), "key": key}
    if judged:
        right = summary.features.logits.argmax(dim=1).cpu() == torch.from_numpy(images.labels)
        found["metrics"]["accuracy"] = right.double().mean().item()
    write_json(kept, found)
    return found


def write_tables(folder: Path, results: list[dict]) -> None:
    """Writes the points so far as `results.json`, `results.csv` and `results.md`."""
    write_json(folder / "results.json", results)
    settings = results[0]["settings"]
    extractor = settings["feature_extractor"]
    metrics = [metric for metric in METRICS if all(metric in result["metrics"] for result in results)]
    header = [*results[0]["point"], *(metric_label(metric, extractor) for metric in metrics)]
    rows = [[*result["point"].values(), *(result["metrics"][metric] for metric in metrics)] for result in results]
    with atomic_write(folder / "results.csv") as partial, open(partial, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    cells = [
        [*map(str, result["point"].values()), *(f"{result['metrics'][metric]:.4f}" for metric in metrics)]
        for result in results
    ]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    reference = settings["reference"]
    lines += [
        "",
        f"Features: {extractor}. {settings['samples']['num_images']} samples a point; reference: {Path(reference['name']).name},"
        f" statistics of {reference['num_images'] or '?'} images, {reference['num_neighbours']} neighbours.",
    ]
    with atomic_write(folder / "results.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(path: Path, results: list[dict], axes: dict[str, list]) -> None:
    """Each metric against the guidance scale, or against the first axis of several numbers; precision against recall."""
    extractor = results[0]["settings"]["feature_extractor"]
    metrics = [metric for metric in PLOTTED if all(metric in result["metrics"] for result in results)]
    several = [name for name, values in axes.items() if len(values) > 1]
    numbers = [
        name
        for name in several
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in axes[name])
    ]
    if not numbers:
        path.unlink(missing_ok=True)  # of a sweep of other axes
        return
    horizontal = "guidance_scale" if "guidance_scale" in numbers else numbers[0]
    lines: dict[str, list[dict]] = {}
    for result in results:
        others = {name: result["point"][name] for name in several if name != horizontal}
        lines.setdefault(described(others), []).append(result)

    def line(found: list[dict], x: str | None, y: str) -> Line:
        found = sorted(found, key=lambda result: result["point"][horizontal])
        xs = [result["point"][horizontal] if x is None else result["metrics"][x] for result in found]
        return xs, [result["metrics"][y] for result in found]

    panels = [
        (
            metric_label(metric, extractor),
            horizontal,
            {name: line(found, None, metric) for name, found in lines.items()},
        )
        for metric in metrics
    ]
    if "recall" in metrics:
        panels.append(
            ("precision", "recall", {name: line(found, "recall", "precision") for name, found in lines.items()})
        )
    save_lines(path, panels)
