"""Quality against cost, of solvers and of ways to guide: `python -m diffusers_adm.evaluation.bench_sampling REFERENCE`.

DDPM and DDIM at 250 steps once, each solver at 5 to 25; then, of the two best solvers, guidance within an interval, by entropy, and
with skipped classifier calls; then the best fast settings and DDPM again with other seeds. All draw the same labels, guided. What is
drawn already is not drawn again, so a run that was stopped goes on.
"""

import argparse
import csv
import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from diffusers_adm.evaluation.arrays import write_json, written_whole
from diffusers_adm.evaluation.features import FeatureExtractor
from diffusers_adm.evaluation.image_sets import NpzImages, add_image_set_arguments
from diffusers_adm.evaluation.metrics import (
    Summary,
    add_extractor_arguments,
    compare,
    extractor_from,
    metric_label,
    summarise,
    summarise_reference,
)
from diffusers_adm.evaluation.plots import save_lines
from diffusers_adm.evaluation.sampling import (
    SCHEDULERS,
    SamplingPipeline,
    add_model_arguments,
    draw_samples,
    load_pipeline,
    set_scheduler,
)
from diffusers_adm.evaluation.shards import processes
from diffusers_adm.evaluation.sweep import folder_name


FAST_STEPS = (5, 10, 15, 20, 25)
MAX_FAST_EVALUATIONS = 20
GUIDANCE = {
    "interval (0.28, 2.9]": {"interval": (0.28, 2.9)},
    "interval (1.12, 11.6]": {"interval": (1.12, 11.6)},
    "entropy scaling": {"entropy_scaling": True},
    "every 2nd, reused": {"every": 2, "skipped": "reuse"},
    "every 2nd, summed": {"every": 2, "skipped": "sum"},
}
COLUMNS = ("frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall")


@dataclass(frozen=True)
class Point:
    """
    Args:
        scheduler: Name in `SCHEDULERS`.
        steps: Of it.
        guidance: Name in `GUIDANCE`, or `""`.
        seed: Of the samples.
    """

    scheduler: str
    steps: int
    guidance: str = ""
    seed: int = 0
    metrics: dict = field(default_factory=dict, compare=False)

    @property
    def call(self) -> dict:
        """Arguments of the pipeline's call."""
        options = {"guidance_options": GUIDANCE[self.guidance]} if self.guidance else {}
        return {"num_inference_steps": self.steps, **options}

    @property
    def distance(self) -> float:
        """What points are chosen by."""
        return self.metrics["frechet_distance"]


class Bench:
    """
    Args:
        args: Parsed.
        pipeline: To draw with.
        reference: To measure against.
        extractor: Of features.
    """

    def __init__(
        self, args: argparse.Namespace, pipeline: SamplingPipeline, reference: Summary, extractor: FeatureExtractor
    ):
        self.args = args
        self.pipeline = pipeline
        self.stock_scheduler = pipeline.scheduler
        self.reference = reference
        self.extractor = extractor
        self.folder = Path(args.output)
        self.points: list[Point] = []

    def measure(self, point: Point) -> Point:
        """Draws a point's samples and measures them; keeps it, and writes the table so far."""
        pipeline = self.pipeline
        pipeline.scheduler = self.stock_scheduler
        set_scheduler(pipeline, point.scheduler)
        call = {**point.call, "guidance_scale": self.args.guidance_scale}
        named = {"scheduler": point.scheduler, **point.call, "seed": point.seed}
        path = draw_samples(
            pipeline,
            self.folder / "points" / folder_name(named),
            num_images=self.args.num_samples,
            batch_size=self.args.batch_size,
            seed=point.seed,
            labels="balanced",
            call=call,
            model_name=self.args.model,
        )
        images = NpzImages(path, labelled=True)
        summary = summarise(images, self.extractor, self.args.feature_batch_size)
        metrics = compare(self.reference, summary, self.extractor.name).metrics
        right = summary.features.logits.argmax(dim=1).cpu() == torch.from_numpy(images.labels)
        metrics["accuracy"] = right.double().mean().item()
        metrics["unet_evaluations"], metrics["classifier_evaluations"] = evaluations(pipeline, call)
        found = replace(point, metrics=metrics)
        self.points.append(found)
        self.write()
        return found

    def write(self) -> None:
        """Writes `results.json`, `results.csv` and `results.md`."""
        write_json(self.folder / "results.json", [vars(point) for point in self.points])
        names = [metric for metric in COLUMNS if metric in self.points[0].metrics]
        header = ["solver", "steps", "guidance", "seed", "UNet", "classifier"]
        header += [metric_label(metric, self.extractor.name) for metric in names] + ["accuracy"]
        rows = [
            [
                point.scheduler,
                point.steps,
                point.guidance or "every step",
                point.seed,
                point.metrics["unet_evaluations"],
                point.metrics["classifier_evaluations"],
                *(f"{point.metrics[metric]:.3f}" for metric in (*names, "accuracy")),
            ]
            for point in self.points
        ]
        with written_whole(self.folder / "results.csv") as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        lines = [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]
        lines += ["", f"{self.args.num_samples} samples a point, guidance scale {self.args.guidance_scale:g}."]
        with written_whole(self.folder / "results.md") as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def plot(self) -> None:
        """Draws the distance against evaluations, those of the classifier counted in."""
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for point in sorted(self.points, key=lambda point: point.steps):
            if point.seed:
                continue
            name = f"{point.scheduler}, {point.guidance}" if point.guidance else point.scheduler
            x, y = lines.setdefault(name, ([], []))
            x.append(point.metrics["unet_evaluations"] + point.metrics["classifier_evaluations"])
            y.append(point.distance)
        fast = {name: line for name, line in lines.items() if max(line[0]) <= 4 * max(FAST_STEPS)}
        label = metric_label("frechet_distance", self.extractor.name)
        save_lines(self.folder / "quality.png", [(label, "evaluations of UNet and classifier", fast)], log_scale=True)


def evaluations(pipeline: SamplingPipeline, call: dict) -> tuple[int, int]:
    """How often one image's UNet and classifier are evaluated."""
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


def main() -> None:
    """Measures all, and prints the table and what to choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="As of `diffusers-adm evaluate`.")
    parser.add_argument("--output", metavar="DIR", required=True)
    parser.add_argument("--num_samples", type=int, default=1000, help="Of each point.")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    add_model_arguments(parser)
    add_extractor_arguments(parser)
    add_image_set_arguments(parser)
    args = parser.parse_args()

    pipeline = load_pipeline(args, processes().device)
    extractor = extractor_from(args)
    if pipeline.classifier is None or not extractor.has_logits:
        raise SystemExit("The bench is of a pipeline with a classifier, by an extractor that knows its classes.")
    reference = summarise_reference(args.reference, extractor, args, args.feature_batch_size)
    bench = Bench(args, pipeline, reference, extractor)
    solvers = [name for name in SCHEDULERS if name != "DDPM"]
    fast = [bench.measure(Point(name, steps)) for steps in FAST_STEPS for name in solvers]
    slow = [bench.measure(Point(name, 250)) for name in ("DDPM", "DDIM")]

    def best(points: list[Point], count: int) -> list[Point]:
        return sorted(points, key=lambda point: point.distance)[:count]

    for steps in (10, 20):
        for point in best([point for point in fast if point.steps == steps], 2):
            fast += [bench.measure(replace(point, guidance=guidance)) for guidance in GUIDANCE]
    candidates = [point for point in fast if point.metrics["unet_evaluations"] <= MAX_FAST_EVALUATIONS]
    spread = {}
    for point in (slow[0], *best(candidates, 3)):
        again = [bench.measure(replace(point, seed=seed)) for seed in (1, 2)]
        distances = [found.distance for found in (point, *again)]
        spread[f"{point.scheduler}, {point.steps} steps, {point.guidance or 'guided at every step'}"] = {
            "mean": statistics.mean(distances),
            "standard_deviation": statistics.stdev(distances),
            "unet_evaluations": point.metrics["unet_evaluations"],
            "classifier_evaluations": point.metrics["classifier_evaluations"],
        }
    write_json(bench.folder / "three_seeds.json", spread)
    bench.plot()
    print((bench.folder / "results.md").read_text(encoding="utf-8"))
    print(json.dumps(spread, indent=2))


if __name__ == "__main__":
    main()
