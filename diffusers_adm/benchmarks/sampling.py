"""Quality against cost, of solvers and of ways to guide: `python -m diffusers_adm.benchmarks.sampling REFERENCE`.

DDPM and DDIM at 250 steps once, each solver with at most 5 to 25 evaluations of the UNet; then, of the two best solvers, guidance
within an interval, by entropy, and with skipped classifier calls; then DDPM and the best fast settings, by the first seed, with two
more seeds. All draw the same labels, guided. What is drawn already is not drawn again, so a run that was stopped goes on; all processes
of a launch draw.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diffusers_adm.atomic_files import write_json
from diffusers_adm.evaluation.features import FeatureExtractor
from diffusers_adm.evaluation.image_sets import add_image_set_arguments, check_changes
from diffusers_adm.evaluation.metrics import (
    Summary,
    add_extractor_arguments,
    check_shape,
    extractor_from,
    metric_label,
    summarise_reference,
)
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.sampling import (
    SCHEDULERS,
    SamplingPipeline,
    add_model_arguments,
    draw_samples,
    load_pipeline,
    set_scheduler,
)
from diffusers_adm.evaluation.sweep import folder_name, measure, write_tables
from diffusers_adm.launch import join_processes
from diffusers_adm.solvers import build_solver


FAST_EVALUATIONS = (5, 10, 15, 20, 25)
SLOW_STEPS = 250
RECOMMENDED_EVALUATIONS = 20  # at most
EVERY_STEP = "every step"
GUIDANCE = {
    EVERY_STEP: {},
    "interval (0.28, 2.9]": {"interval": (0.28, 2.9)},
    "interval (1.12, 11.6]": {"interval": (1.12, 11.6)},
    "entropy scaling": {"entropy_scaling": True},
    "every 2nd, reused": {"every": 2, "skipped": "reuse"},
    "every 2nd, summed": {"every": 2, "skipped": "sum"},
}


class Bench:
    """
    Args:
        args: Parsed.
        state: Of the processes.
        pipeline: To draw with.
        reference: To measure against.
        extractor: Of features.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        state: PartialState,
        pipeline: SamplingPipeline,
        reference: Summary,
        extractor: FeatureExtractor,
    ):
        self.args = args
        self.state = state
        self.pipeline = pipeline
        self.stock_scheduler = pipeline.scheduler
        self.reference = reference
        self.extractor = extractor
        self.folder = Path(args.output)
        self.results: list[dict] = []

    def steps_within(self, scheduler: str, evaluations: int) -> int:
        """How many steps a scheduler takes with no more evaluations of the UNet than that."""
        self.set_scheduler(scheduler)
        return next(
            steps
            for steps in range(evaluations, 0, -1)
            if len(build_solver(self.pipeline.scheduler, steps, None, 0.0).schedule) <= evaluations
        )

    def set_scheduler(self, scheduler: str) -> None:
        """Puts one in the place of the pipeline's own."""
        self.pipeline.scheduler = self.stock_scheduler
        set_scheduler(self.pipeline, scheduler)

    def measure(self, scheduler: str, steps: int, guidance: str = EVERY_STEP, seed: int | None = None) -> dict:
        """
        Draws a point's samples and measures them; keeps what was found, and writes the table so far.

        Args:
            scheduler: Name in `SCHEDULERS`.
            steps: Of it.
            guidance: Name in `GUIDANCE`.
            seed: Of the samples; the run's by default.
        """
        seed = self.args.seed if seed is None else seed
        point = {"solver": scheduler, "steps": steps, "guidance": guidance, "seed": seed}
        self.set_scheduler(scheduler)
        call = {
            "num_inference_steps": steps,
            "guidance_scale": self.args.guidance_scale,
            "guidance_options": GUIDANCE[guidance],
        }
        samples = draw_samples(
            self.pipeline,
            self.folder / "points" / folder_name(point),
            num_images=self.args.num_samples,
            batch_size=self.args.batch_size,
            seed=seed,
            labels="balanced",
            call=call,
            model_name=self.args.model,
        )
        unet, classifier = evaluations(self.pipeline, call)
        found = None
        if self.state.is_main_process:
            found = measure(samples, self.reference, self.extractor, self.args.feature_batch_size, judged=True)
        [found] = broadcast_object_list([found])  # all processes choose the same points by it
        found = {**found, "point": {**point, "UNet": unet, "classifier": classifier}}
        self.results.append(found)
        if self.state.is_main_process:
            write_tables(self.folder, self.results)
        return found

    def again(self, found: dict, **changes) -> dict:
        """Measures a point anew with another kind of guidance, or another seed."""
        point = found["point"]
        same = {"scheduler": point["solver"], "steps": point["steps"], "guidance": point["guidance"]}
        return self.measure(**{**same, **changes})

    def plot(self) -> None:
        """
        Draws the distance against evaluations, those of the classifier counted in: `quality.png` of the solvers, and
        `guidance.png` of the kinds of guidance. What is more than ten times the smallest is cut off.
        """
        seed, most = self.args.seed, max(FAST_EVALUATIONS)
        shown = [found for found in self.results if found["point"]["seed"] == seed and found["point"]["UNet"] <= most]
        solvers = [found for found in shown if found["point"]["guidance"] == EVERY_STEP]
        compared = {found["point"]["solver"] for found in shown if found["point"]["guidance"] != EVERY_STEP}
        kinds = [found for found in shown if found["point"]["solver"] in compared]
        label = metric_label("frechet_distance", self.extractor.name)
        for name, results in (("quality.png", solvers), ("guidance.png", kinds)):
            lines: dict[str, Line] = {}
            for found in sorted(results, key=lambda found: found["point"]["steps"]):
                point = found["point"]
                guidance = "" if point["guidance"] == EVERY_STEP else f", {point['guidance']}"
                x, y = lines.setdefault(point["solver"] + guidance, ([], []))
                x.append(point["UNet"] + point["classifier"])
                y.append(distance(found))
            panel = (label, "evaluations of UNet and classifier", dict(sorted(lines.items())))
            save_lines(self.folder / name, [panel], log_scale=True, top=10 * min(map(distance, results)))


def distance(found: dict) -> float:
    """What points are chosen by."""
    return found["metrics"]["frechet_distance"]


def best(results: list[dict], count: int) -> list[dict]:
    """The points of the smallest distances."""
    return sorted(results, key=distance)[:count]


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
    """Measures all, and prints the table, and the spread of what decides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="As of `diffusers-adm evaluate`.")
    parser.add_argument("--output", metavar="DIR", required=True)
    parser.add_argument("--num_samples", type=int, default=1000, help="Of each point.")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    add_model_arguments(parser)
    add_extractor_arguments(parser)
    add_image_set_arguments(parser)
    args = parser.parse_args()

    check_changes(args, args.reference)
    state = join_processes()
    pipeline = load_pipeline(args, state.device)
    extractor = extractor_from(args)
    if pipeline.classifier is None or not extractor.has_logits:
        raise SystemExit("The bench is of a pipeline with a classifier, by an extractor that knows its classes.")
    reference = summarise_reference(args.reference, extractor, args, args.feature_batch_size)
    config = pipeline.unet.config
    check_shape(reference, (config.sample_size, config.sample_size, config.in_channels))
    bench = Bench(args, state, pipeline, reference, extractor)
    solvers = [name for name in SCHEDULERS if name != "DDPM"]
    fast = {
        count: [bench.measure(name, bench.steps_within(name, count)) for name in solvers] for count in FAST_EVALUATIONS
    }
    slow = [bench.measure(name, SLOW_STEPS) for name in ("DDPM", "DDIM")]
    for count in (10, 20):
        for found in best(fast[count], 2):
            fast[count] += [bench.again(found, guidance=guidance) for guidance in GUIDANCE if guidance != EVERY_STEP]
    candidates = [found for count, points in fast.items() if count <= RECOMMENDED_EVALUATIONS for found in points]
    spread = []
    for found in (slow[0], *best(candidates, 3)):
        seeds = [args.seed, args.seed + 1, args.seed + 2]
        distances = [distance(found), *(distance(bench.again(found, seed=seed)) for seed in seeds[1:])]
        spread.append(
            {
                **found["point"],
                "seeds": seeds,
                "distances": distances,
                "mean": statistics.mean(distances),
                "standard_deviation": statistics.stdev(distances),
            }
        )
    if not state.is_main_process:
        return
    write_json(bench.folder / "three_seeds.json", spread)
    bench.plot()
    print((bench.folder / "results.md").read_text(encoding="utf-8"))
    print(json.dumps(spread, indent=2))


if __name__ == "__main__":
    main()
