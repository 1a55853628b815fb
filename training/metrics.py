"""Metrics of a run: means of the losses, and the file `metrics.jsonl`."""

import contextlib
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusers_adm.atomic_files import atomic_write
from diffusers_adm.training.objective import LossTerms


NUM_QUARTERS = 4


def quarter_of(timestep: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Returns the quarter of each timestep, `(batch,)`, in 0 ... 3. Quarter 0 has the least noise."""
    return NUM_QUARTERS * timestep // num_timesteps


class LossMeans:
    """
    Means of an objective's terms over the steps between two log entries, over all timesteps and per quarter.

    Terms are added per batch. They count after `keep_step`, so that skipped optimizer steps do not enter the means.

    Args:
        num_timesteps: Number of training timesteps.
    """

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # (1 + terms, quarters); the first row has the weights of the images
        self.pending: torch.Tensor | None = None  # the same sums for the current step

    def add(self, terms: LossTerms) -> None:
        """Adds the terms of one batch of the current step."""
        quarter = quarter_of(terms.timestep, self.num_timesteps)  # (batch,)
        quarter = torch.nn.functional.one_hot(quarter, NUM_QUARTERS).float()  # (batch, quarters)
        values = {"loss": terms.loss, **terms.logged}
        self.names = list(values)
        weight = torch.ones_like(quarter[:, 0]) if terms.weight is None else terms.weight  # (batch,)
        rows = [weight, *(value.detach().float() for value in values.values())]
        sums = torch.stack(rows) @ quarter
        self.pending = sums if self.pending is None else self.pending + sums

    def keep_step(self) -> None:
        """Counts the terms of the current step, and begins the next step."""
        if self.pending is not None:
            self.sums = self.pending if self.sums is None else self.sums + self.pending
        self.pending = None

    def drop_step(self) -> None:
        """Drops the terms of the current step, and begins the next step."""
        self.pending = None

    def finite(self) -> torch.Tensor:
        """Returns whether all counted terms are finite."""
        return torch.tensor(True) if self.sums is None else self.sums.isfinite().all()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes by name, and resets them."""
        if self.sums is None:
            return {}
        weights, *sums = accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        means = {}
        for name, by_quarter in zip(self.names, sums):
            means[name] = sum(by_quarter) / sum(weights)
            for quarter, weight in enumerate(weights):
                if weight:
                    means[f"{name}_quarter_{quarter}"] = by_quarter[quarter] / weight
        return means


def append_metrics(path: Path, step: int, values: dict[str, float]) -> None:
    """Appends an entry to a `metrics.jsonl`. Its `time` is in seconds since 1970."""
    entry = {"step": step, **values, "time": round(time.time(), 3)}
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the entries of a `metrics.jsonl`. Lines that a full disk or a killed run left incomplete are skipped."""
    entries: list[dict[str, float]] = []
    if not path.is_file():
        return entries  # runs shorter than --logging_steps write no file
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def drop_metrics_after(path: Path, step: int, validated: bool) -> None:
    """
    Removes entries that a resumed run will write again, and incomplete lines.

    Args:
        path: Path of a `metrics.jsonl`.
        step: Number of steps that the resumed run has taken already.
        validated: Whether the validation after these steps is complete.
    """

    def is_final(entry: dict[str, float]) -> bool:
        is_validation = any(name.startswith("validation_") for name in entry)
        return entry["step"] < step or (entry["step"] == step and (validated or not is_validation))

    entries = [entry for entry in read_metrics(path) if is_final(entry)]
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
