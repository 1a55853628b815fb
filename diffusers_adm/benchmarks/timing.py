"""Measurements of time and memory for benchmarks."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch


def median_seconds(calls: list[Callable], rounds: int) -> list[float]:
    """Returns the median time of each call in seconds. The calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own_times in zip(calls, times):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own_times.append(time.perf_counter() - started)
    return [statistics.median(own_times) for own_times in times]


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process. On a machine with a GPU, it is the memory of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_line_of(module: str, words: list[str]) -> str:
    """
    Runs a module in a new process, and returns the last line that it prints.

    Args:
        module: Name of the module.
        words: Arguments of its command line.
    """
    run = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr)
    return run.stdout.splitlines()[-1]
