"""Steps at which a run logs, saves checkpoints and validates."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffusers_adm.training.options import TrainingOptions


@dataclass(frozen=True)
class Rhythm:
    """
    Steps at which an action is due.

    Args:
        periods: Numbers of steps. The action is due at multiples of each.
        first: Additional step, before the others.
    """

    periods: tuple[int, ...]
    first: int | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether the action is due at a step."""
        return step == self.first or any(step % period == 0 for period in self.periods)

    def __str__(self) -> str:
        every = " and ".join("every step" if period == 1 else f"every {period} steps" for period in self.periods)
        return every if self.first in (None, min(self.periods)) else f"{every}, first at step {self.first}"


class Schedule:
    """
    Steps at which a run logs, saves checkpoints and validates. Options that are not given default to parts of the run's length.

    Args:
        options: Options of the run. `max_train_steps` must be set.
    """

    def __init__(self, options: TrainingOptions):
        output = options.output
        tenth = max(1, options.optimisation.max_train_steps // 10)
        self.logging = Rhythm((output.logging_steps or min(50, tenth),))
        by_default = Rhythm((min(5000, tenth),), first=max(1, min(5000, tenth) // 10))
        self.saving = Rhythm((output.checkpointing_steps,)) if output.checkpointing_steps else by_default
        self.validating = Rhythm((output.validation_steps,)) if output.validation_steps else by_default
        push_every = options.push_every
        if push_every is not None and push_every % self.validating.periods[0]:
            self.validating = Rhythm((*self.validating.periods, push_every), self.validating.first)

    def describe(self, actions: Iterable[str]) -> str:
        """Returns a sentence about the schedule. `actions` name the validations, such as "draws 20 images"."""
        parts = [f"logs {self.logging}", f"saves a checkpoint {self.saving}"]
        actions = list(actions)
        if actions:
            parts.append(f"{', '.join(actions)} {self.validating}")
        return f"The run {'; '.join(parts)}. It also saves{' and validates' if actions else ''} at the end."
