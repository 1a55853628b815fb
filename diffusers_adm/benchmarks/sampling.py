"""Quality and cost of solvers and kinds of guidance: `python -m diffusers_adm.benchmarks.sampling REFERENCE`.

First, DDPM and DDIM are evaluated at 250 steps, and each solver with at most 5, 10, 15, 20 and 25 evaluations of the UNet. Then the two
best solvers are evaluated with other kinds of guidance: within an interval, with entropy scaling, and with skipped gradients. Finally,
DDPM and the best fast settings are evaluated with two more seeds. All points are guided and have the same labels. An interrupted run
continues where it stopped. All launched processes draw.
"""

import json
import sys
from dataclasses import dataclass

from diffusers_adm.atomic_files import write_json
from diffusers_adm.benchmarks.points import (
    BenchOptions,
    Points,
    add_bench_options,
    bench_arguments,
    distance,
    spread_of,
)
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.evaluation.options import SCHEDULERS
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.report import metric_label
from diffusers_adm.options import add_examples, option
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


@dataclass(frozen=True)
class SolverBenchOptions(BenchOptions):
    """Samples of each point."""

    guidance_scale: float = option(1.0, help="Guidance scale.")


class Bench(Points):
    """
    Evaluation of solvers and kinds of guidance.

    Args:
        arguments: Arguments of [`Points`].
        guidance_scale: Guidance scale.
    """

    def __init__(self, *arguments, guidance_scale: float = 1.0):
        super().__init__(*arguments)
        self.guidance_scale = guidance_scale

    def steps_within(self, scheduler: str, evaluations: int) -> int:
        """Returns the largest number of steps of a scheduler that takes at most `evaluations` evaluations of the UNet."""
        self.set_scheduler(scheduler)
        return next(
            steps
            for steps in range(evaluations, 0, -1)
            if len(build_solver(self.pipeline.scheduler, steps, None, 0.0).schedule) <= evaluations
        )

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
        seed = self.settings.seed if seed is None else seed
        call = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale,
            "guidance_options": GUIDANCE[guidance],
        }
        return self.evaluate_point(
            {"solver": scheduler, "steps": steps, "guidance": guidance, "seed": seed}, scheduler, call
        )

    def evaluate_again(self, result: dict, **changes) -> dict:
        """Evaluates a point with another kind of guidance or another seed."""
        point = result["point"]
        same = {"scheduler": point["solver"], "steps": point["steps"], "guidance": point["guidance"]}
        return self.evaluate(**{**same, **changes})

    def evaluate_spread(self, result: dict) -> dict:
        """Evaluates a point with two more seeds, and returns the mean and standard deviation of the three distances."""
        others = [self.evaluate_again(result, seed=self.settings.seed + number) for number in (1, 2)]
        return spread_of([result, *others])

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


def best(results: list[dict], count: int) -> list[dict]:
    """Returns the points with the smallest distances."""
    return sorted(results, key=distance)[:count]


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
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.sampling", description=__doc__)
    add_bench_options(parser, SolverBenchOptions)
    add_examples(
        parser,
        f"{parser.prog} reference.npz --output bench --feature_extractor mnist-digits --register digit_features.py",
        f"{parser.prog} my_images --resolution 64 --model me/my-model --output bench --num_samples 5000",
    )
    options, arguments = bench_arguments(parser, SolverBenchOptions)
    bench = Bench(*arguments, guidance_scale=options.guidance_scale)
    spread = evaluate_all(bench)
    if not bench.state.is_main_process:
        return
    write_json(bench.folder / "three_seeds.json", spread)
    bench.plot()
    print((bench.folder / "results.md").read_text(encoding="utf-8"))
    print(json.dumps(spread, indent=2))


if __name__ == "__main__":
    sys.exit(run_command("sampling", main))
