"""Reports of metrics: tables, JSON, and entries of model cards."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError

from diffusers_adm.atomic_files import atomic_write, check_can_write, write_json
from diffusers_adm.evaluation.feature_options import INCEPTION
from diffusers_adm.records import as_record


# Names of the metrics with Inception's features and with other features. Only a distance of Inception's features is called FID.
METRICS = {
    "frechet_distance": ("FID", "FD"),
    "spatial_frechet_distance": ("sFID", "sFD"),
    "inception_score": ("IS", "IS"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "kernel_distance": ("KID", "KD"),
    "kernel_distance_std": ("KID std", "KD std"),
    "accuracy": ("accuracy", "accuracy"),
}


def metric_label(metric: str, extractor: str) -> str:
    """Returns the name of a metric that is computed from an extractor's features."""
    return METRICS[metric][extractor != INCEPTION]


@dataclass
class Evaluation:
    """
    Metrics of samples, and their settings.

    Args:
        metrics: Value of each metric, by its name in `METRICS`. Metrics that could not be computed are left out.
        settings: Extractor, reference and samples.
        notes: Remarks for the reader.

    Raises:
        ValueError: If a metric is not finite.
    """

    metrics: dict[str, float]
    settings: dict
    notes: list[str]

    def __post_init__(self):
        failed = [f"{self.label(name)} {value}" for name, value in self.metrics.items() if not math.isfinite(value)]
        if failed:
            raise ValueError(
                f"Metrics must be finite, but got {', '.join(failed)}. Check the statistics of the reference and the features for"
                " extreme values."
            )

    def label(self, metric: str) -> str:
        """Returns the name of a metric."""
        return metric_label(metric, self.settings["feature_extractor"])

    def table(self) -> str:
        """Returns the metrics in Markdown."""
        samples = self.settings["samples"]
        lines = [
            f"| {self.settings['feature_extractor']} | {samples['num_images']} samples |",
            "| --- | --- |",
            *(f"| {self.label(metric)} | {value:.4f} |" for metric, value in self.metrics.items()),
            "",
            f"Samples: {samples['name']}. {describe_features(self.settings)}",
            *self.notes,
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """Returns the content of a JSON file."""
        return {"metrics": self.metrics, "settings": self.settings, "notes": self.notes}

    def eval_results(self) -> list[EvalResult]:
        """Returns the metrics as entries of a model card."""
        reference, samples = self.settings["reference"], self.settings["samples"]
        extractor, recorded = self.settings["feature_extractor"], samples["metadata"]
        sampling = {name: recorded[name] for name in ("scheduler", "call") if name in recorded}
        dataset = Path(reference["name"]).name
        return [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=reference["metadata"].get("dataset", dataset),
                dataset_name=dataset,
                metric_type=self.label(metric).lower().replace(" ", "_"),
                metric_name=f"{self.label(metric)} ({extractor}, {samples['num_images']} samples)",
                metric_value=value,
                metric_args={"feature_extractor": extractor, **sampling},
            )
            for metric, value in self.metrics.items()
        ]


def read_card(path: Path) -> ModelCard:
    """
    Reads a model card to which metrics will be added.

    Raises:
        ValueError: If the file does not exist, or its front matter is damaged.
        OSError: If the folder of the file is not writable.
    """
    if not path.is_file():
        raise ValueError(f"--model_card must be a file, but got {path}.")
    check_can_write(path)
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        raise ValueError(f"The front matter of --model_card {path} cannot be read: {error}") from error


def add_to_card(card: ModelCard, evaluation: Evaluation, path: Path) -> None:
    """Writes metrics into the front matter of a card. Entries of the same metric, reference and settings are replaced."""
    new = evaluation.eval_results()
    old = card.data.eval_results or []
    card.data.eval_results = [result for result in old if not any(map(result.is_equal_except_value, new))] + new
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    with atomic_write(path) as partial:
        partial.write_text(str(card), encoding="utf-8")


def write_tables(folder: Path, results: list[dict]) -> None:
    """
    Writes the metrics of several points as `results.json`, `results.csv` and `results.md`. If a point lacks a metric, its cell is empty.

    Args:
        folder: Folder of the files.
        results: `Evaluation.as_dict` of each point, with its settings as `"point"`.
    """
    recorded = [{**result, "point": as_record(result["point"])} for result in results]
    write_json(folder / "results.json", recorded)
    settings = results[0]["settings"]
    extractor = settings["feature_extractor"]
    metrics = [metric for metric in METRICS if any(metric in result["metrics"] for result in results)]
    header = [*results[0]["point"], *(metric_label(metric, extractor) for metric in metrics)]
    points = [[*result["point"].values()] for result in results]
    values = [[result["metrics"].get(metric) for metric in metrics] for result in results]
    rows = [point + row for point, row in zip(points, values)]
    cells = [["" if value is None else f"{value:.4f}" for value in row] for row in values]
    cells = [point + row for point, row in zip(points, cells)]
    remark = f"{settings['samples']['num_images']} samples per point. {describe_features(settings)}"
    write_csv(folder / "results.csv", header, rows)
    write_markdown(folder / "results.md", header, cells, remark)


def describe_features(settings: dict) -> str:
    """Returns sentences about the extractor and the reference of an evaluation, from its settings."""
    reference = settings["reference"]
    return (
        f"Features: {settings['feature_extractor']}. Reference: {Path(reference['name']).name}, with statistics of"
        f" {reference['num_images'] or '?'} images, and {reference['num_neighbours'] or 'no'} images for precision and recall."
    )


def write_csv(path: Path, header: list, rows: list[list]) -> None:
    """Writes a table as CSV."""
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_markdown(path: Path, header: list, rows: list[list], remark: str) -> None:
    """Writes a table in Markdown, with a remark below it."""
    with atomic_write(path) as partial:
        partial.write_text(f"{markdown_table(header, rows)}\n\n{remark}\n", encoding="utf-8")


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))
