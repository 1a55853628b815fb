"""Options of the commands that run a pipeline."""

from dataclasses import dataclass

from diffusers_adm.options import at_least, in_range, option


DTYPES = ("float32", "float16", "bfloat16")
MAX_IMAGES = 10**8  # more is a slip of the keyboard, for which nobody should wait until the memory is full
MAX_BATCH_SIZE = 10**5


@dataclass(frozen=True)
class ModelOptions:
    """Pipeline to load."""

    model: str | None = option(
        None,
        help="Folder or Hub id of a pipeline, or released:NAME of a released checkpoint. By default the one of digits that ships"
        " with this package.",
    )
    revision: str | None = option(None, help="Branch, tag or commit on the Hub.")
    variant: str | None = option(None, help="Variant of the weight files, such as fp16.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights.")


@dataclass(frozen=True)
class RunOptions:
    """Seed and batch size of a run."""

    seed: int = option(0, help="Seed of the run. The seed of each image is derived from it.", check=at_least(0))
    batch_size: int = option(50, help="Number of images per batch.", check=in_range(1, MAX_BATCH_SIZE))
