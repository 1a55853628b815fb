"""Requests to stop a run before its end, and agreement of its processes."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import torch
from accelerate import Accelerator


class RunFailed(RuntimeError):
    """End of a run that cannot go on, for a reason that its message tells."""


class StopRequest:
    """
    Notices signals that ask the processes to stop (SIGTERM, SIGUSR1 as batch systems send it, or Ctrl-C), which would end them.
    A second Ctrl-C ends them.

    Args:
        accelerator: Accelerator of the script.
    """

    SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT)

    def __init__(self, accelerator: Accelerator):
        self.received = False
        # A group of its own on the CPU: a question to the other processes must not wait for an accelerator.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals for as long as the context lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets no other thread set handlers
            return
        previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not by `print`, which a signal may have interrupted.
            os.write(2, b"\nStopping: a checkpoint is saved after this step. Press Ctrl-C again to end at once.\n")

    def agreed(self) -> bool:
        """Returns whether any process was asked to stop. All processes must call it equally often."""
        return self.on_any_process(self.received)

    def on_any_process(self, flag: bool) -> bool:
        """Returns whether a flag is set on any process. All processes must call it equally often."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Makes a loader's worker ignore the signals that ask to stop, which go to whole groups of processes."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
