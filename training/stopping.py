"""What asks a run to stop before its end."""

import contextlib
import signal
import threading

import torch
from accelerate import Accelerator


class StopRequest:
    """
    Notices that the processes were asked to stop (SIGTERM, or SIGUSR1 as batch systems send it), instead of dying of it.

    Args:
        accelerator: Of `start`.
    """

    SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))

    def __init__(self, accelerator: Accelerator):
        self.received = False
        # A group of its own on the CPU: to ask the other processes must not wait for an accelerator.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    @contextlib.contextmanager
    def listening(self):
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

    def _receive(self, *_) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any process was asked; the same answer on all of them. Each must call it equally often."""
        return self.on_any_process(self.received)

    def on_any_process(self, flag: bool) -> bool:
        """Whether a flag is set on any process."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags)


def leave_signals_to_the_trainer(worker: int) -> None:
    """A loader's worker outlives the signals that ask to stop, which go to whole groups of processes."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
