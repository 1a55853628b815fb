"""Tables and plots of an ablation, with the mean and the spread over seeds."""

import statistics
from pathlib import Path

from diffusers_adm.atomic_files import write_json
from diffusers_adm.evaluation.plots import Line, save_lines
from diffusers_adm.evaluation.report import METRICS, describe_features, metric_label, write_csv, write_markdown


LABELS = {"train_seconds": "train seconds", "validation_loss": "held-out loss"}
# Changes from the first variant, and the metric that changes.
CHANGES = {"loss_change": "validation_loss", "change": "frechet_distance"}
# Part of the training from which losses are plotted, because the first losses are many times larger.
PLOTTED_FROM = 0.2


def write_results(folder: Path, results: list[dict], costs: dict[str, dict[str, int]], about: dict) -> None:
    """
    Writes `results.json`, `results.csv`, `results.md` and `ablation.png`.

    Args:
        folder: Folder of the files.
        results: `variant`, `seed`, `metrics` and `loss_curve` of each run.
        costs: Number of parameters and of multiplications and additions (MACs) per image of each variant.
        about: Budget, and settings of the evaluation.
    """
    first = next(iter(costs))
    names = [name for name in (*LABELS, *METRICS) if all(name in result["metrics"] for result in results)]
    by_variant: dict[str, list[dict]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], []).append(result)
    rows = []
    for variant, runs in by_variant.items():
        values = {name: [run["metrics"][name] for run in runs] for name in names}
        for change, name in CHANGES.items():
            if name in names:
                values[change] = changes(runs, by_variant.get(first, []), name)
        spread = {name: mean_and_spread(numbers) for name, numbers in values.items() if numbers}
        rows.append({"variant": variant, **costs[variant], "spread": spread, "runs": runs})
    write_json(folder / "results.json", {**about, "variants": rows})
    _write_tables(folder, rows, names, about)
    _plot(folder / "ablation.png", by_variant, names, about["settings"]["feature_extractor"])


def mean_and_spread(numbers: list[float]) -> dict[str, float | None]:
    """Returns the mean of some numbers, and their standard deviation, which is `None` for a single number."""
    return {
        "mean": statistics.mean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


def changes(runs: list[dict], first: list[dict], name: str) -> list[float]:
    """
    Returns the differences of a metric between runs and the runs of the first variant with the same seeds. Runs without such a run,
    which may have failed, are left out.
    """
    by_seed = {run["seed"]: run["metrics"][name] for run in first}
    return [run["metrics"][name] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]


def _write_tables(folder: Path, rows: list[dict], names: list[str], about: dict) -> None:
    extractor = about["settings"]["feature_extractor"]

    def label(name: str) -> str:
        if name in CHANGES:
            return f"change of {label(CHANGES[name])}"
        return LABELS.get(name) or metric_label(name, extractor)

    names = [*names, *(change for change, name in CHANGES.items() if name in names)]
    header = ["variant", "seeds", "parameters", "MACs"]
    numbers = [
        [row["variant"], len(row["runs"]), row["parameters"], row["macs"]]
        + [row["spread"].get(name, {}).get(part) for name in names for part in ("mean", "std")]
        for row in rows
    ]
    columns = [text for name in names for text in (label(name), f"{label(name)} spread")]
    write_csv(folder / "results.csv", [*header, *columns], numbers)

    shown = ("train_seconds", "validation_loss", "loss_change", "frechet_distance", "change", "precision", "recall")
    shown = [name for name in shown if name in names]
    cells = [
        [row["variant"], len(row["runs"]), f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.1f} M"]
        + [as_cell(row["spread"].get(name)) for name in shown]
        for row in rows
    ]
    remark = (
        f"{about['budget']} MACs are those of one forward pass per image. {about['settings']['samples']['num_images']} samples per"
        f" run. Cells have the mean and the standard deviation over seeds. {describe_features(about['settings'])}"
    )
    write_markdown(folder / "results.md", [*header, *map(label, shown)], cells, remark)


def as_cell(spread: dict[str, float | None] | None) -> str:
    """Returns a mean and a spread as text. An unknown one is empty."""
    if spread is None:
        return ""
    return f"{spread['mean']:.4g}" + ("" if spread["std"] is None else f" ± {spread['std']:.2g}")


def _plot(path: Path, by_variant: dict[str, list[dict]], names: list[str], extractor: str) -> None:
    """Plots the distance and the held-out loss over the training time, and precision over recall. Each marker is one run."""

    def lines(vertical: str, horizontal: str) -> dict[str, Line]:
        points = {
            variant: sorted((run["metrics"][horizontal], run["metrics"][vertical]) for run in runs)
            for variant, runs in by_variant.items()
        }
        return {variant: tuple(map(list, zip(*pairs))) for variant, pairs in points.items()}

    panels = []
    if "train_seconds" in names:
        panels.append(
            (metric_label("frechet_distance", extractor), "train seconds", lines("frechet_distance", "train_seconds"))
        )
    if "train_seconds" in names and "validation_loss" in names:
        curves = {variant: mean_curve(runs) for variant, runs in by_variant.items()}
        panels.append(("held-out loss", "train seconds", curves))
    if "recall" in names:
        panels.append(("precision", "recall", lines("precision", "recall")))
    if panels:
        save_lines(path, panels)


def mean_curve(runs: list[dict]) -> Line:
    """Returns the mean held-out loss over the mean training time of runs, at the steps that all of them have validated."""
    curves = [dict(run["loss_curve"]) for run in runs]
    last = max(curves[0])
    steps = sorted(step for step in set.intersection(*map(set, curves)) if step >= PLOTTED_FROM * last)
    seconds = statistics.mean(run["metrics"]["train_seconds"] for run in runs)
    losses = [statistics.mean(curve[step] for curve in curves) for step in steps]
    return [seconds * step / last for step in steps], losses
