"""Quality and cost of solvers and kinds of guidance: `python -m diffusers_adm.benchmarks.sampling REFERENCE`.

First, DDPM and DDIM are evaluated at 250 steps, and each solver with at most 5, 10, 15, 20 and 25 evaluations of the UNet. Then the two
best solvers are evaluated with other kinds of guidance: within an interval, with entropy scaling, and with skipped gradients. Finally,
DDPM and the best fast settings are evaluated with two more seeds. All points are guided and have the same labels. An interrupted run
continues where it stopped. All launched processes draw.
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diffusers_adm.atomic_files import write_json
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.data.options import NO_DATASET, ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.features import load_extractor
from diffusers_adm.evaluation.metrics import check_shape
from diffusers_adm.evaluation.options import MAX_IMAGES, NEIGHBOUR, SCHEDULERS, ModelOptions, RunOptions
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.reference import check_extractor, summarise_reference
from diffusers_adm.evaluation.report import metric_label, write_tables
from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
from diffusers_adm.evaluation.schedulers import SamplingPipeline, set_scheduler
from diffusers_adm.evaluation.sweep import PointEvaluator, folder_name
from diffusers_adm.launch import join_processes
from diffusers_adm.options import add_examples, add_options, build_options, in_range, option, option_values, text_as
from diffusers_adm.solvers import build_solver


FAST_EVALUATIONS = (5, 10, 15, 20, 25)
SLOW_STEPS = 250
MAX_RECOMMENDED_EVALUATIONS = 20
EVERY_STEP = "every step"
GUIDANCE = {
    EVERY_STEP: {},
    "interval (0.28, 2.9]": {"interval": (0.28, 2.9)},
    "interval (1.12, 11.6]": {"interval": (1.12, 11.6)},
    "entropy scaling": {"entropy_scaling": True},
    "every 2nd, reused": {"every": 2, "skipped": "reuse"},
    "every 2nd, summed": {"every": 2, "skipped": "sum"},
}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Samples of each point."""

    output: Path = option(metavar="DIR", help="Folder of the run: a new folder, or that of an interrupted run.")
    num_samples: int = option(1000, help="Number of images per point.", check=in_range(NEIGHBOUR + 1, MAX_IMAGES))
    guidance_scale: float = option(1.0, help="Guidance scale.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """
    Settings that all points share.

    Args:
        num_images: Number of images per point.
        batch_size: Number of images per batch.
        seed: Seed of the points. The best points are also evaluated with the next two seeds.
        guidance_scale: Guidance scale.
        model_name: Folder or Hub id of the pipeline, for the record.
    """

    num_images: int = 1000
    batch_size: int = 50
    seed: int = 0
    guidance_scale: float = 1.0
    model_name: str | None = None


class Bench:
    """
    Evaluation of points of quality and cost, whose results are saved in a folder.

    Args:
        pipeline: Pipeline with a classifier, on this process's device.
        evaluator: Evaluator of samples with `judged=True`.
        folder: Folder of the run, on a disk that all processes can read and write.
        settings: Settings that all points share.
    """

    def __init__(
        self, pipeline: SamplingPipeline, evaluator: PointEvaluator, folder: Path, settings: Settings = Settings()
    ):
        self.pipeline = pipeline
        self.stock_scheduler = pipeline.scheduler
        self.evaluator = evaluator
        self.folder = folder
        self.settings = settings
        self.state = PartialState()
        self.results: list[dict] = []

    def steps_within(self, scheduler: str, evaluations: int) -> int:
        """Returns the largest number of steps of a scheduler that takes at most `evaluations` evaluations of the UNet."""
        self.set_scheduler(scheduler)
        return next(
            steps
            for steps in range(evaluations, 0, -1)
            if len(build_solver(self.pipeline.scheduler, steps, None, 0.0).schedule) <= evaluations
        )

    def set_scheduler(self, scheduler: str) -> None:
        """Replaces the pipeline's scheduler."""
        self.pipeline.scheduler = self.stock_scheduler
        set_scheduler(self.pipeline, scheduler)

    def evaluate(self, scheduler: str, steps: int, guidance: str = EVERY_STEP, seed: int | None = None) -> dict:
        """
        Draws and evaluates the samples of a point, and writes the table of all points so far.

        Args:
            scheduler: Name in `SCHEDULERS`.
            steps: Number of steps.
            guidance: Name in `GUIDANCE`.
            seed: Seed of the samples. `None` means the seed of the settings.

        Returns:
            Point and its metrics.
        """
        settings = self.settings if seed is None else dataclasses.replace(self.settings, seed=seed)
        point = {"solver": scheduler, "steps": steps, "guidance": guidance, "seed": settings.seed}
        self.set_scheduler(scheduler)
        call = {
            "num_inference_steps": steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_options": GUIDANCE[guidance],
        }
        samples = draw_samples(
            self.pipeline,
            self.folder / "points" / folder_name(point),
            num_images=settings.num_images,
            batch_size=settings.batch_size,
            seed=settings.seed,
            labels="balanced",
            call=call,
            model_name=settings.model_name,
        )
        unet, classifier = evaluations(self.pipeline, call)
        metrics = [self.evaluator(samples) if self.state.is_main_process else None]
        broadcast_object_list(metrics)  # all processes need them to choose the same points
        result = {**metrics[0], "point": {**point, "UNet": unet, "classifier": classifier}}
        self.results.append(result)
        if self.state.is_main_process:
            write_tables(self.folder, self.results)
        return result

    def evaluate_again(self, result: dict, **changes) -> dict:
        """Evaluates a point with another kind of guidance or another seed."""
        point = result["point"]
        same = {"scheduler": point["solver"], "steps": point["steps"], "guidance": point["guidance"]}
        return self.evaluate(**{**same, **changes})

    def evaluate_spread(self, result: dict) -> dict:
        """Evaluates a point with two more seeds, and returns the mean and standard deviation of the three distances."""
        seeds = [self.settings.seed + number for number in range(3)]
        distances = [distance(result), *(distance(self.evaluate_again(result, seed=seed)) for seed in seeds[1:])]
        return {
            **result["point"],
            "seeds": seeds,
            "distances": distances,
            "mean": statistics.mean(distances),
            "standard_deviation": statistics.stdev(distances),
        }

    def plot(self) -> None:
        """
        Plots the distance over the number of evaluations of UNet and classifier. `quality.png` compares solvers, and `guidance.png`
        compares kinds of guidance. Distances above ten times the smallest are cut off.
        """
        seed, most = self.settings.seed, max(FAST_EVALUATIONS)
        shown = [
            result for result in self.results if result["point"]["seed"] == seed and result["point"]["UNet"] <= most
        ]
        solvers = [result for result in shown if result["point"]["guidance"] == EVERY_STEP]
        compared = {result["point"]["solver"] for result in shown if result["point"]["guidance"] != EVERY_STEP}
        kinds = [result for result in shown if result["point"]["solver"] in compared]
        label = metric_label("frechet_distance", self.evaluator.extractor.name)
        for name, results in (("quality.png", solvers), ("guidance.png", kinds)):
            lines: dict[str, Line] = {}
            for result in sorted(results, key=lambda result: result["point"]["steps"]):
                point = result["point"]
                guidance = "" if point["guidance"] == EVERY_STEP else f", {point['guidance']}"
                x, y = lines.setdefault(point["solver"] + guidance, ([], []))
                x.append(point["UNet"] + point["classifier"])
                y.append(distance(result))
            panel = (label, "evaluations of UNet and classifier", dict(sorted(lines.items())))
            save_lines(self.folder / name, [panel], log_scale=True, top=10 * min(map(distance, results)))


def distance(result: dict) -> float:
    """Returns the Frechet distance of a point, which decides what the best points are."""
    return result["metrics"]["frechet_distance"]


def best(results: list[dict], count: int) -> list[dict]:
    """Returns the points with the smallest distances."""
    return sorted(results, key=distance)[:count]


def evaluations(pipeline: SamplingPipeline, call: dict) -> tuple[int, int]:
    """Returns the number of evaluations of the UNet and of the classifier per image."""
    counts = []
    for model in (pipeline.unet, pipeline.classifier):
        count = []
        hook = model.register_forward_pre_hook(lambda _, args, count=count: count.append(len(args[0])))
        counts.append((count, hook))
    pipeline([0], generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    for _, hook in counts:
        hook.remove()
    unet, classifier = (sum(count) for count, _ in counts)
    return unet, classifier


def evaluate_all(bench: Bench) -> list[dict]:
    """Evaluates all points. Returns the spread over three seeds of DDPM and of the best fast points."""
    solvers = [name for name in SCHEDULERS if name != "DDPM"]
    fast = {
        count: [bench.evaluate(name, bench.steps_within(name, count)) for name in solvers]
        for count in FAST_EVALUATIONS
    }
    slow = [bench.evaluate(name, SLOW_STEPS) for name in ("DDPM", "DDIM")]
    for count in (10, 20):
        for result in best(fast[count], 2):
            fast[count] += [
                bench.evaluate_again(result, guidance=guidance) for guidance in GUIDANCE if guidance != EVERY_STEP
            ]
    candidates = [
        result for count, points in fast.items() if count <= MAX_RECOMMENDED_EVALUATIONS for result in points
    ]
    return [bench.evaluate_spread(result) for result in (slow[0], *best(candidates, 3))]


def main() -> None:
    """Evaluates all points, then prints the table and the spread of the best points."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "reference",
        type=text_as(),
        metavar="REFERENCE",
        help="Reference batch (.npz), or images, as for `diffusers-adm evaluate`. Required.",
    )
    add_options(parser, BenchOptions, title="samples")
    add_options(parser, ModelOptions, title="model")
    add_options(parser, RunOptions, title="run")
    add_options(parser, FeatureOptions, title="features")
    add_options(parser, ImageSetOptions, without=NO_DATASET, title="images")
    program = "python -m diffusers_adm.benchmarks.sampling"
    add_examples(
        parser,
        f"{program} reference.npz --output bench --feature_extractor mnist-digits --register digit_features.py",
        f"{program} my_images --resolution 64 --model me/my-model --output bench --num_samples 5000",
    )
    args = parser.parse_args()

    images, features, options, model, run = (
        build_options(cls, args) for cls in (ImageSetOptions, FeatureOptions, BenchOptions, ModelOptions, RunOptions)
    )
    images.check(args.reference)
    check_extractor(args.reference, features.feature_extractor)
    state = join_processes()
    pipeline = load_pipeline(**option_values(model), device=state.device)
    extractor = load_extractor(features)
    if pipeline.classifier is None or not extractor.has_logits:
        raise ValueError(
            "The benchmark requires a pipeline with a classifier, and a feature extractor that is a classifier."
        )
    reference = summarise_reference(args.reference, extractor, images, features.feature_batch_size)
    config = pipeline.unet.config
    check_shape(reference, (config.sample_size, config.sample_size, config.in_channels))
    evaluator = PointEvaluator(reference, extractor, features.feature_batch_size, judged=True)
    settings = Settings(
        num_images=options.num_samples,
        guidance_scale=options.guidance_scale,
        model_name=model.model,
        **option_values(run),
    )
    bench = Bench(pipeline, evaluator, options.output, settings)
    spread = evaluate_all(bench)
    if not state.is_main_process:
        return
    write_json(bench.folder / "three_seeds.json", spread)
    bench.plot()
    print((bench.folder / "results.md").read_text(encoding="utf-8"))
    print(json.dumps(spread, indent=2))


if __name__ == "__main__":
    sys.exit(run_command("sampling", main))
