"""Suppression of log messages and progress bars of other packages."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hide_bars_in_logs() -> None:
    """
    Switches off the progress bars of diffusers, datasets and other packages if stderr is not a terminal, because a bar fills a log
    with its repetitions. It must be called before tqdm is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def without_warning(text: str) -> Iterator[None]:
    """
    Drops log messages of diffusers' models that contain a text.

    Args:
        text: Part of the messages to drop.
    """

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class QuietCastMixin:
    """Mixin that suppresses a warning that does not apply when a model is cast. It must come first among the base classes."""

    def to(self, *args, **kwargs):
        """Moves and casts the model, see `ModelMixin.to`."""
        # Up to version 0.42, diffusers warns about modules to keep in float32 even if the model names none.
        with without_warning("should be kept in float32: []"):
            return super().to(*args, **kwargs)
