"""Log records of diffusers that tell its users nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warning(text: str) -> Iterator[None]:
    """
    Drops the log records of diffusers' models that contain a text.

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
    """Model of diffusers that is cast without a warning. It comes first among the bases."""

    def to(self, *args, **kwargs):
        """Moves and casts the model, see `ModelMixin.to`."""
        # Up to version 0.42 diffusers warns of modules to keep in float32 even where a model names none.
        with without_warning("should be kept in float32: []"):
            return super().to(*args, **kwargs)
