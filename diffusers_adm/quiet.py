"""Suppression of log messages of diffusers that do not apply."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
