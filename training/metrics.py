"""What a run tells of itself while it goes on."""

import contextlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator


NUM_QUARTERS = 4


def quarter_of(timestep: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Which quarter of the timesteps each lies in, least noise first: `(batch,)`, in 0 ... 3."""
    return NUM_QUARTERS * timestep // num_timesteps


class Means:
    """Means of the terms of a loss over the steps between two log entries, in all and by quarter of the timesteps."""

    def __init__(self):
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # (1 + terms, quarters); the first row counts images

    @staticmethod
    def of_batch(terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sums of one batch, `(1 + terms, quarters)`."""
        quarter = torch.nn.functional.one_hot(terms["quarter"], NUM_QUARTERS).float()  # (batch, quarters)
        values = [torch.ones_like(quarter[:, 0])]
        values += [term.detach().float() for name, term in terms.items() if name != "quarter"]
        return torch.stack(values) @ quarter

    def add(self, names: list[str], sums: torch.Tensor) -> None:
        """Adds the sums of one or more batches."""
        self.names = names
        self.sums = sums if self.sums is None else self.sums + sums

    def finite(self) -> torch.Tensor:
        """Whether all that was added is."""
        return torch.tensor(True) if self.sums is None else self.sums.isfinite().all()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes, by name; begins anew."""
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The entries of a `metrics.jsonl`, without lines that a full disk or a kill has cut off."""
    entries: list[dict[str, float]] = []
    if not path.is_file():
        return entries  # a run of fewer steps than are between two entries
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries
