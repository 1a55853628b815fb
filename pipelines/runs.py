"""State of a run that callbacks read and may change, apart from the pipeline: threads and callbacks may share a pipeline."""

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
        interrupt: Whether the steps that are left are skipped.
        active: Whether the run is still going on.
    """

    guidance_scale: float | list[float] | torch.Tensor
    num_timesteps: int
    interrupt: bool = False
    active: bool = True


class Runs:
    """
    Runs of a pipeline in all threads.

    State of a run lives here and not on the pipeline, so that two threads may use one pipeline, and a callback may call it.

    Attributes:
        active: Runs that are going on, in the order in which they began.
    """

    def __init__(self):
        self.active: list[Run] = []
        self._own = threading.local()

    def __reduce__(self):
        return Runs, ()  # a deep copy of a pipeline has no runs yet

    @property
    def current(self) -> Run | None:
        """
        This thread's run: the innermost one that is going on, otherwise one of another thread, otherwise this thread's last
        one.
        """
        own: Run | None = getattr(self._own, "run", None)
        if own is not None and own.active:
            return own
        return self.active[-1] if self.active else own

    def change(self, **state) -> None:
        """Changes the state of this thread's run. A thread without one, such as that of a stop button, changes all runs."""
        own: Run | None = getattr(self._own, "run", None)
        own_is_active = own is not None and own.active
        for run in [own] if own_is_active else list(self.active):
            for name, value in state.items():
                setattr(run, name, value)

    @contextlib.contextmanager
    def running(self, guidance_scale: float | list[float] | torch.Tensor, num_timesteps: int) -> Iterator[Run]:
        """
        Yields the state of a new run, which goes on for as long as the context lasts. Each of its steps enters [`Runs.step_of`].

        Args:
            guidance_scale: Guidance scale of the call. It is copied, because a callback may change it in place, and a
                tensor goes to the CPU, where reading it every step waits for nothing.
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
        Makes a run this thread's own for one step. Between two steps it belongs to no thread, because each step may be taken in
        another one, and several runs may take turns in one.
        """
        outer: Run | None = getattr(self._own, "run", None)
        self._own.run = run
        try:
            yield
        finally:
            self._own.run = outer


class RunStateMixin:
    """
    Properties of a pipeline that callbacks of diffusers use. They are those of this thread's run, see [`Runs`].

    Attributes:
        _runs: Runs of the pipeline; its constructor makes them.
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
        """Whether the current run skips the steps that are left. A callback may set `_interrupt`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        run = self._runs.current
        return run is not None and run.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._runs.change(interrupt=interrupt)
