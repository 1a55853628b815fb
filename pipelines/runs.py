"""State of a run that callbacks read and may change, apart from the pipeline: threads and callbacks may share a pipeline."""

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Run:
    """
    State of one run that callbacks read and may change.

    Args:
        guidance_scale: Guidance scale, one number or one per image. It is read at every step.
        num_timesteps: Number of steps.
        interrupt: Whether the steps that are left are skipped.
        active: Whether the run is still going on.
    """

    guidance_scale: float | list[float] | torch.Tensor
    num_timesteps: int
    interrupt: bool = False
    active: bool = True


class LatestRun(threading.local):
    """
    Latest run of a pipeline in each thread: the innermost one while runs go on, otherwise the last one that has ended.

    State of a run lives here and not on the pipeline, so that two threads may use one pipeline, and a callback may call it.
    """

    run: Run | None = None

    def __reduce__(self):
        return LatestRun, ()  # a copied pipeline has no runs yet

    def begin(self, guidance_scale: float | list[float] | torch.Tensor, num_timesteps: int) -> Run:
        """
        Begins a run.

        Args:
            guidance_scale: Guidance scale of the call. It is copied, because a callback may change it in place, and a
                tensor goes to the CPU, where reading it every step waits for nothing.
            num_timesteps: Number of steps.
        """
        is_tensor = isinstance(guidance_scale, torch.Tensor)
        scale = guidance_scale.to("cpu", copy=True) if is_tensor else copy.copy(guidance_scale)
        self.run = Run(scale, num_timesteps)
        return self.run

    def end(self, run: Run, outer: Run | None) -> None:
        """Ends a run. A run around it, whose callback has called the pipeline, is the latest again."""
        run.active = False
        self.run = outer if outer is not None and outer.active else run


class RunStateMixin:
    """
    Properties of a pipeline that callbacks of diffusers use. They are those of this thread's run: the innermost one while runs
    go on, and otherwise the last one.

    Attributes:
        _latest: Latest run of each thread; the pipeline's constructor makes it.
    """

    _latest: LatestRun

    @property
    def guidance_scale(self) -> float | list[float] | torch.Tensor:
        """Guidance scale of this thread's run. It is read at every step, so callbacks can change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def _guidance_scale(self) -> float | list[float] | torch.Tensor:
        run = self._latest.run
        return self.config.guidance_scale if run is None else run.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float | list[float] | torch.Tensor) -> None:
        if self._latest.run is not None:
            self._latest.run.guidance_scale = guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this thread's run."""
        run = self._latest.run
        return self.config.num_inference_steps if run is None else run.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether this thread's run skips the steps that are left. A callback may set `_interrupt`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._latest.run is not None and self._latest.run.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        if self._latest.run is not None:
            self._latest.run.interrupt = interrupt

    @contextlib.contextmanager
    def _running(self, guidance_scale: float | list[float] | torch.Tensor, num_timesteps: int) -> Iterator[Run]:
        """
        Yields the state of a run. For as long as the context lasts it is what this thread's callbacks see of the pipeline.

        Args:
            guidance_scale: Guidance scale of the call.
            num_timesteps: Number of steps.
        """
        outer = self._latest.run
        run = self._latest.begin(guidance_scale, num_timesteps)
        try:
            yield run
        finally:
            self._latest.end(run, outer)
