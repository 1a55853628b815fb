"""Times of calls that are compared."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(calls: list[Callable], rounds: int) -> list[float]:
    """Median time of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]
