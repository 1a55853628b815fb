"""Images in `.npz` files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusers_adm.data.image_modes import MODES
from diffusers_adm.data.npz import NpzFile


class NpzImages:
    """
    Images of an `.npz` file: `arr_0`, `(images, height, width, channels)` uint8, and optionally `arr_1`, their labels.

    Attributes:
        name: Origin of the images.
        num_images: Number of images.
        shape: `(height, width, channels)` of each image.
        labels: Class of each image, `(num_images,)`, or `None` if they are missing or not wanted.
        fingerprint: Text that differs between images of the same name.
        mixed: Whether the order of the images is independent of their classes.

    Args:
        path: Path of the file.
        labelled: Whether to read the labels.

    Raises:
        ValueError: If the file has no such arrays.
    """

    mixed = True  # as samples are drawn, and published batches kept

    def __init__(self, path: str | Path, labelled: bool = False):
        self.name = str(path)
        self.file = NpzFile(path)
        shape, dtype = self.file.header("arr_0")
        if len(shape) != 4 or shape[3] not in MODES or dtype != np.uint8 or not shape[0]:
            raise ValueError(
                f"{path}: arr_0 must be images (number, height, width, 1 or 3) of uint8: it is {shape} {dtype}."
            )
        self.num_images, self.shape = shape[0], shape[1:]
        self.fingerprint = f"{self.file.checksum('arr_0'):08x}"
        self.labels = self.file.read("arr_1") if labelled and "arr_1" in self.file else None
        if self.labels is None:
            return
        if self.labels.shape != (self.num_images,) or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"{path}: arr_1, {self.labels.dtype} {self.labels.shape}, does not number the classes of"
                f" {self.num_images} images."
            )

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields all images in order, `(batch, height, width, channels)` uint8."""
        return self.file.blocks("arr_0", batch_size)

    def chosen(self, numbers: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """
        Yields some of the images, by their ascending numbers.

        Args:
            numbers: Numbers of the images.
            batch_size: Number of images that are read at once. Those that are not wanted are left out of a batch.
        """
        for first, batch in zip(range(0, self.num_images, batch_size), self.batches(batch_size)):
            wanted = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + len(batch))]
            if len(wanted):
                yield batch[wanted - first]
