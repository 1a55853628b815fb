"""Progress of long work: a bar on a terminal, or occasional lines in a log."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm


Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0


def with_progress(
    items: Iterable[Item], total: int, description: str, unit: str, seconds: float = SECONDS_BETWEEN_LINES
) -> Iterator[Item]:
    """
    Yields items and shows progress on stderr.

    Args:
        items: Items to yield. An item counts as done when the next one is requested.
        total: Number of items.
        description: Name of the work.
        unit: Name of the items, in the plural.
        seconds: Seconds between two lines if stderr is not a terminal. Work that takes less time then shows no line.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, unit=f" {unit}", disable=False)
        return
    started = latest = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - latest >= seconds:
            latest = now
            left = datetime.timedelta(seconds=round((now - started) / done * (total - done)))
            print(f"{description}: {done} of {total} {unit}, {left} left", file=sys.stderr, flush=True)
        yield item
