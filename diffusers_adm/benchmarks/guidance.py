"""Quality and cost of methods of guidance: `python -m diffusers_adm.benchmarks.guidance REFERENCE`.

Each method is evaluated with some settings and the seed `--seed`. The setting with the smallest Frechet distance is the best one. It is
evaluated with the next three seeds, if its distance is near the smallest one so far, as that of the first method always is. Therefore
the seeds of the final figures did not choose the settings. Particles, which take long, are evaluated with one seed. All points have the
same labels. An interrupted run continues where it stopped. All launched processes draw.
"""

import sys
from dataclasses import dataclass, replace

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
from diffusers_adm.evaluation.report import markdown_table
from diffusers_adm.options import add_examples, option


STEPS = 10
STEPS_OF_DDPM = 25
# A method whose best distance is above the smallest one so far by this factor is not evaluated again.
NEAR = 1.4
PLAIN = "plain"
INTERVAL = {"interval": (1.12, 11.6)}
SEARCHED_STEPS = [826, 600, 459, 322, 163]  # printed by `diffusers-adm search-steps` for the default model


@dataclass(frozen=True)
class Family:
    """
    Methods that are compared with one another.

    Args:
        scheduler: Name in `SCHEDULERS`.
        call: Arguments of the pipeline's call that all methods share.
        methods: Settings of each method: arguments of the call. The first method is plain guidance.
        num_seeds: Number of further seeds of the best setting of each method.
    """

    scheduler: str
    call: dict
    methods: dict[str, list[dict]]
    num_seeds: int = 3


def weaker(kind: str, *weights: float) -> list[dict]:
    """Returns the settings of guidance by a weaker prediction."""
    return [{"weaker": kind, "cfg_weight": weight} for weight in weights]


def guider(kind: str, *scales: float, **arguments) -> list[dict]:
    """Returns the settings of a guider of diffusers."""
    return [{"guider": {"kind": kind, "guidance_scale": scale, **arguments}} for scale in scales]


FAMILIES = {
    "conditional UNet, no classifier": Family(
        "DDIM",
        {"num_inference_steps": STEPS, "guidance_scale": 0.0},
        {
            PLAIN: [{}],
            "null class": weaker("null_class", 0.25, 0.5, 1.0),
            "random class": weaker("random_class", 0.25, 0.5, 1.0),
            "perturbed attention": weaker("perturbed_attention", 0.25, 0.5, 1.0),
            "smoothed attention": weaker("smoothed_attention", 0.25, 0.5),
            "epsilon scaling": [{"epsilon_scale": scale} for scale in (0.99, 0.995, 1.005)],
            "adaptive projected guidance": guider(
                "AdaptiveProjectedGuidance", 1.5, 2.0, 2.5, eta=0.0, adaptive_projected_guidance_momentum=-0.5
            ),
            "CFG-Zero*": guider("ClassifierFreeZeroStarGuidance", 1.25, 1.5, zero_init_steps=0),
            "tangential": guider("TangentialClassifierFreeGuidance", 1.25, 1.5),
        },
    ),
    "conditional UNet and classifier": Family(
        "DDIM",
        {"num_inference_steps": STEPS, "guidance_scale": 1.0},
        {
            PLAIN: [{}],
            "other scale": [{"guidance_scale": scale} for scale in (0.5, 1.5)],
            "interval (1.12, 11.6]": [{"guidance_options": INTERVAL}],
            "null class": weaker("null_class", 0.25),
            "random class": weaker("random_class", 0.25),
            "perturbed attention": weaker("perturbed_attention", 0.25, 0.5),
            "smoothed attention": weaker("smoothed_attention", 0.25),
            "epsilon scaling": [{"epsilon_scale": scale} for scale in (0.99, 0.995, 1.005)],
            "restart": [{"restart": {"sigma_min": 0.3, "sigma_max": 2.0, "times": times}} for times in (1, 2)],
        },
    ),
    "conditional UNet and classifier, SA-Solver": Family(
        "SASolver",
        {"num_inference_steps": STEPS},
        {
            PLAIN: [{"guidance_scale": 1.0, "guidance_options": INTERVAL}],
            "random class, no classifier": [
                {"guidance_scale": 0.0, **setting} for setting in weaker("random_class", 0.25)
            ],
            "random class": [
                {"guidance_scale": 0.5, "guidance_options": INTERVAL, **setting}
                for setting in weaker("random_class", 0.125, 0.25)
            ],
        },
    ),
    "conditional UNet and classifier, 5 steps of DPM-Solver++": Family(
        "DPMSolverMultistep",
        {"guidance_scale": 1.0},
        {PLAIN: [{"num_inference_steps": 5}], "searched steps": [{"timesteps": SEARCHED_STEPS}]},
    ),
    "conditional UNet and classifier, Euler": Family(
        "EulerDiscrete",
        {"num_inference_steps": STEPS, "guidance_scale": 1.0},
        {PLAIN: [{}], "churn": [{"churn": {"s_churn": churn, "s_tmin": 0.05, "s_tmax": 50.0}} for churn in (1, 4)]},
    ),
    "unconditional UNet and classifier": Family(
        "DDIM",
        {"num_inference_steps": STEPS, "condition_unet": False, "guidance_scale": 5.0},
        {
            PLAIN: [{"guidance_scale": scale} for scale in (2.0, 5.0, 10.0)],
            "perturbed attention": weaker("perturbed_attention", 0.25, 0.5),
        },
    ),
    "conditional UNet and classifier, DDPM": Family(
        "DDPM",
        {"num_inference_steps": STEPS_OF_DDPM, "guidance_scale": 1.0},
        {PLAIN: [{}], "epsilon scaling": [{"epsilon_scale": scale} for scale in (1.005, 1.01, 1.02)]},
    ),
    "unconditional UNet and classifier, DDPM": Family(
        "DDPM",
        {"num_inference_steps": STEPS_OF_DDPM, "condition_unet": False, "guidance_scale": 1.0},
        {PLAIN: [{}], "4 particles": [{"particles": 4}], "16 particles": [{"particles": 16}]},
        num_seeds=0,
    ),
}


@dataclass(frozen=True)
class GuidanceBenchOptions(BenchOptions):
    """Samples of each point."""

    discriminator: str | None = option(
        None,
        metavar="FILE:NAME",
        help="Guidance function of classifier and discriminator, as for --guidance_fn of sample.",
    )
    only: str = option(
        "", metavar="TEXT", help="Evaluate only families whose name contains this.", unset="all families"
    )


def chosen_families(only: str, discriminator: str | None) -> dict[str, Family]:
    """
    Returns the families of methods.

    Args:
        only: Text that the names of the families contain.
        discriminator: Guidance function of classifier and discriminator, or `None` to leave it out.

    Raises:
        ValueError: If no family has such a name.
    """
    families = dict(FAMILIES)
    if discriminator is not None:
        name = "conditional UNet and classifier"
        methods = {**families[name].methods, "discriminator": [{"guidance_fn": discriminator}]}
        families[name] = replace(families[name], methods=methods)
    chosen = {name: family for name, family in families.items() if only in name}
    if not chosen:
        raise ValueError(f"--only must be part of one of {', '.join(map(repr, families))}, but got {only!r}.")
    return chosen


def evaluate_method(points: Points, family_name: str, family: Family, name: str, limit: float) -> tuple[dict, dict]:
    """
    Evaluates all settings of a method, and the best one with three more seeds if it is good.

    Args:
        points: Points of the benchmark.
        family_name: Name of the family.
        family: Family of the method.
        name: Name of the method.
        limit: Distance above which the best setting is not evaluated again.

    Returns:
        Best point with the seed of the settings, and the row of the method in the table of methods.
    """
    seed = points.settings.seed

    def evaluate(setting: dict, seed: int) -> dict:
        point = {"family": family_name, "method": name, "setting": str(setting), "seed": seed}
        return points.evaluate_point(point, family.scheduler, {**family.call, **setting})

    tried = [(evaluate(setting, seed), setting) for setting in family.methods[name]]
    best, setting = min(tried, key=lambda pair: distance(pair[0]))
    row = {"family": family_name, "method": name, "setting": setting, "distance_of_choice": distance(best)}
    row["UNet"], row["classifier"] = best["point"]["UNet"], best["point"]["classifier"]
    if distance(best) > limit or not family.num_seeds:
        return best, {**row, "metrics": best["metrics"]}
    again = [evaluate(setting, seed + number) for number in range(1, family.num_seeds + 1)]
    means = {metric: sum(result["metrics"][metric] for result in again) / len(again) for metric in again[0]["metrics"]}
    return best, {**row, "metrics": means, "spread": spread_of(again)}


def evaluate_all(points: Points, families: dict[str, Family]) -> list[dict]:
    """Evaluates all methods, and writes `methods.json` after each."""
    rows = []
    for family_name, family in families.items():
        smallest = float("inf")
        for name in family.methods:
            best, row = evaluate_method(points, family_name, family, name, NEAR * smallest)
            smallest = min(smallest, distance(best))
            rows.append(row)
            if points.state.is_main_process:
                write_json(points.folder / "methods.json", rows)
                print(*cells_of(row), sep=" | ", flush=True)
    return rows


def cells_of(row: dict) -> list[str]:
    """Returns the cells of a method's row."""
    metrics, spread = row["metrics"], row.get("spread")
    value = f"{metrics['frechet_distance']:.3f}"
    return [
        row["family"],
        row["method"],
        f"`{row['setting']}`" if row["setting"] else "",
        f"{row['UNet']}, {row['classifier']}",
        f"{value} (1 seed)" if spread is None else f"{value} ± {spread['standard_deviation']:.3f}",
        f"{100 * metrics['accuracy']:.1f} %",
        f"{metrics['precision']:.3f}",
        f"{metrics['recall']:.3f}",
    ]


def main() -> None:
    """Evaluates all methods, and prints their table."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.guidance", description=__doc__)
    add_bench_options(parser, GuidanceBenchOptions)
    add_examples(
        parser,
        f"{parser.prog} reference.npz --output bench --feature_extractor mnist-digits --register digit_features.py",
        f"{parser.prog} my_images --resolution 64 --model me/my-model --output bench --discriminator guide.py:build",
    )
    options, arguments = bench_arguments(parser, GuidanceBenchOptions)
    points = Points(*arguments)
    rows = evaluate_all(points, chosen_families(options.only, options.discriminator))
    if points.state.is_main_process:
        header = ("methods of", "method", "best setting", "UNet, classifier", "FD", "right", "precision", "recall")
        print(markdown_table(header, map(cells_of, rows)))


if __name__ == "__main__":
    sys.exit(run_command("guidance", main))
