"""Images in `.npz` files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusers_adm.data.image_modes import MODES
from diffusers_adm.data.npz import NpzFile


class NpzImages:
    """
    Images of an `.npz` file. The array `arr_0` holds the images, `(images, height, width, channels)`, uint8. An optional array `arr_1`
    holds their labels, `(images,)`.

    Attributes:
        name: Name of the source of the images.
        num_images: Number of images.
        shape: `(height, width, channels)` of each image.
        labels: Class of each image, `(num_images,)`, or `None` if there are none or they are not read.
        class_names: `None`, because such files have no names of classes.
        fingerprint: Text that tells apart different images from sources of the same name.
        mixed: Whether the order of the images is independent of their classes.

    Args:
        path: Path of the file.
        labelled: Whether to read the labels.

    Raises:
        ValueError: If the file has no such arrays.
    """

    class_names = None

    def __init__(self, path: str | Path, labelled: bool = False):
        self.name = str(path)
        self.file = NpzFile(path)
        shape, dtype = self.file.header("arr_0")
        if len(shape) != 4 or shape[3] not in MODES or dtype != np.uint8 or not shape[0]:
            raise ValueError(
                f"arr_0 in {path} must be uint8 images, (images, height, width, 1 or 3), but got {shape} {dtype}."
            )
        self.num_images, self.shape = shape[0], shape[1:]
        self.fingerprint = f"{self.file.checksum('arr_0'):08x}"
        # They are mixed as `sample` draws them and in the files of the original code, unless a file listed their labels.
        self.mixed = not str(self.file.metadata().get("labels")).startswith("listed")
        self.labels = self.file.read("arr_1") if labelled and "arr_1" in self.file else None
        if self.labels is None:
            return
        if self.labels.shape != (self.num_images,) or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"arr_1 in {path} must be one integer label per image, ({self.num_images},), but got {self.labels.shape}"
                f" {self.labels.dtype}."
            )

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields all images in order, `(batch, height, width, channels)` uint8."""
        return self.file.blocks("arr_0", batch_size)

    def chosen(self, numbers: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """
        Yields some of the images.

        Args:
            numbers: Numbers of the images, in ascending order.
            batch_size: Number of images that are read at once. Images without their number in `numbers` are left out of a batch.
        """
        for first, batch in zip(range(0, self.num_images, batch_size), self.batches(batch_size)):
            wanted = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + len(batch))]
            if len(wanted):
                yield batch[wanted - first]
