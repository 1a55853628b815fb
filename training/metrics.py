"""Metrics of a run: means of the losses, and the file that they are written to."""

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
    """Returns the quarter of the timesteps that each lies in, `(batch,)`, in 0 ... 3, where 0 has the least noise."""
    return NUM_QUARTERS * timestep // num_timesteps


class LossMeans:
    """
    Means of an objective's terms over the steps between two log entries, in all and by quarter of the timesteps.

    Terms are added batch by batch, and count once the optimizer step that they belong to is kept.

    Args:
        num_timesteps: Number of timesteps of the training.
    """

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # (1 + terms, quarters); the first row counts images
        self.pending: torch.Tensor | None = None  # the same for the current step

    def add(self, terms: LossTerms) -> None:
        """Adds the terms of one batch of the current step."""
        quarter = quarter_of(terms.timestep, self.num_timesteps)  # (batch,)
        quarter = torch.nn.functional.one_hot(quarter, NUM_QUARTERS).float()  # (batch, quarters)
        values = {"loss": terms.loss, **terms.logged}
        self.names = list(values)
        rows = [torch.ones_like(quarter[:, 0]), *(value.detach().float() for value in values.values())]
        sums = torch.stack(rows) @ quarter
        self.pending = sums if self.pending is None else self.pending + sums

    def keep_step(self) -> None:
        """Counts the terms of the current step, and begins the next."""
        if self.pending is not None:
            self.sums = self.pending if self.sums is None else self.sums + self.pending
        self.pending = None

    def drop_step(self) -> None:
        """Forgets the terms of the current step, and begins the next."""
        self.pending = None

    def finite(self) -> torch.Tensor:
        """Returns whether all terms that count are finite."""
        return torch.tensor(True) if self.sums is None else self.sums.isfinite().all()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes by name, and begins anew."""
        if self.sums is None:
            return {}
        counts, *sums = accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        means = {}
        for name, by_quarter in zip(self.names, sums):
            means[name] = sum(by_quarter) / sum(counts)
            for quarter, count in enumerate(counts):
                if count:
                    means[f"{name}_quarter_{quarter}"] = by_quarter[quarter] / count
        return means


def append_metrics(path: Path, step: int, values: dict[str, float]) -> None:
    """Appends an entry to a `metrics.jsonl`. Its `time` is in seconds since 1970."""
    entry = {"step": step, **values, "time": round(time.time(), 3)}
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the entries of a `metrics.jsonl`, without lines that a full disk or a kill has cut off."""
    entries: list[dict[str, float]] = []
    if not path.is_file():
        return entries  # a run of fewer steps than are between two entries
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def drop_metrics_after(path: Path, step: int, validated: bool) -> None:
    """
    Removes entries that a resumed run will write again, and lines that were cut off.

    Args:
        path: A `metrics.jsonl`.
        step: Number of steps after which the run resumes.
        validated: Whether the validation of that step is complete.
    """

    def is_final(entry: dict[str, float]) -> bool:
        is_validation = any(name.startswith("validation_") for name in entry)
        return entry["step"] < step or (entry["step"] == step and (validated or not is_validation))

    entries = [entry for entry in read_metrics(path) if is_final(entry)]
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
