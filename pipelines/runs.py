"""State of a run that callbacks read and may change. It is separate from the pipeline, which threads and callbacks may share."""

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Run:
    """
    State of one run that callbacks read and may change.

    Args:
        guidance_scale: Guidance scale, one number or one per image. It is read at every step.
        num_timesteps: Number of steps.
        interrupt: Whether the remaining steps are skipped.
        active: Whether the run has not ended yet.
    """

    guidance_scale: float | list[float] | torch.Tensor
    num_timesteps: int
    interrupt: bool = False
    active: bool = True


class Runs:
    """
    Runs of a pipeline in all threads.

    The state of a run is stored here and not on the pipeline, so that threads can share a pipeline, and a callback can call it.

    Attributes:
        active: Runs that have not ended yet, in the order in which they began.
    """

    def __init__(self):
        self.active: list[Run] = []
        self._own = threading.local()

    def __reduce__(self):
        return Runs, ()  # a deep copy of a pipeline has no runs yet

    @property
    def current(self) -> Run | None:
        """
        Run of this thread. If a callback has called the pipeline, it is the inner run. If this thread has no active run, it is an
        active run of another thread. If there is none, it is the last run of this thread.
        """
        own: Run | None = getattr(self._own, "run", None)
        if own is not None and own.active:
            return own
        return self.active[-1] if self.active else own

    def change(self, **state) -> None:
        """Changes the state of this thread's run. A thread without a run, such as that of a stop button, changes all runs."""
        own: Run | None = getattr(self._own, "run", None)
        own_is_active = own is not None and own.active
        for run in [own] if own_is_active else list(self.active):
            for name, value in state.items():
                setattr(run, name, value)

    @contextlib.contextmanager
    def running(self, guidance_scale: float | list[float] | torch.Tensor, num_timesteps: int) -> Iterator[Run]:
        """
        Yields the state of a new run. The run is active inside the context. Each of its steps must enter [`Runs.step_of`].

        Args:
            guidance_scale: Guidance scale of the call. It is copied, because a callback may change it in place. A tensor is moved to
                the CPU, because reading it from a GPU at every step would wait.
            num_timesteps: Number of steps.
        """
        is_tensor = isinstance(guidance_scale, torch.Tensor)
        scale = guidance_scale.to("cpu", copy=True) if is_tensor else copy.copy(guidance_scale)
        run = Run(scale, num_timesteps)
        self.active.append(run)
        try:
            yield run
        finally:
            run.active = False
            self.active.remove(run)
            outer: Run | None = getattr(self._own, "run", None)
            if outer is None or not outer.active:  # otherwise a callback of the outer run has called the pipeline
                self._own.run = run

    @contextlib.contextmanager
    def step_of(self, run: Run) -> Iterator[None]:
        """
        Makes a run the run of this thread for one step. Between two steps, a run belongs to no thread, because each step may be taken in
        another thread, and several runs may take turns in one thread.
        """
        outer: Run | None = getattr(self._own, "run", None)
        self._own.run = run
        try:
            yield
        finally:
            self._own.run = outer


class RunStateMixin:
    """
    Properties of a pipeline that callbacks of diffusers use. They describe the run of the current thread, see [`Runs`].

    Attributes:
        _runs: Runs of the pipeline. Its constructor sets them.
    """

    _runs: Runs

    @property
    def guidance_scale(self) -> float | list[float] | torch.Tensor:
        """Guidance scale of the current run. It is read at every step, so callbacks can change it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def _guidance_scale(self) -> float | list[float] | torch.Tensor:
        run = self._runs.current
        return self.config.guidance_scale if run is None else run.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float | list[float] | torch.Tensor) -> None:
        self._runs.change(guidance_scale=guidance_scale)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current run."""
        run = self._runs.current
        return self.config.num_inference_steps if run is None else run.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current run skips its remaining steps. Callbacks can set `_interrupt`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        run = self._runs.current
        return run is not None and run.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._runs.change(interrupt=interrupt)
