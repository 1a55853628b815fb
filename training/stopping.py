"""Requests to stop a run before its end, and agreement of its processes."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import torch
from accelerate import Accelerator


class StopRequest:
    """
    Catches the signals that ask a run to stop: SIGTERM, SIGUSR1 (which batch systems send) and Ctrl-C. Otherwise, they would end the
    process without a checkpoint. A second Ctrl-C ends the process at once.

    Args:
        accelerator: Accelerator of the script.
    """

    SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT)

    def __init__(self, accelerator: Accelerator):
        self.received = False
        # A separate group on the CPU, so that asking the other processes does not wait for the GPU.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside the context."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows signal handlers in the main thread only
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
            # `print` is not safe here, because the signal may have interrupted another `print`.
            os.write(2, b"\nStopping: a checkpoint is saved after this step. Press Ctrl-C again to end at once.\n")

    def agreed(self) -> bool:
        """Returns whether any process was asked to stop. All processes must call it the same number of times."""
        return self.on_any_process(self.received)

    def on_any_process(self, flag: bool) -> bool:
        """Returns whether a flag is set on any process. All processes must call it the same number of times."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Makes a worker of a loader ignore the signals that ask to stop, because they are sent to all processes of a group."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
