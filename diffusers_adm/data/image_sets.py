"""Samples and reference images of an evaluation, from `.npz` files or any source that `datasets.load_dataset` supports."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from diffusers_adm.data.datasets import load_rows
from diffusers_adm.data.image_modes import is_deep, to_mode
from diffusers_adm.data.images import UnreadableImage, decode, file_name, fit_image
from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.data.options import ImageSetOptions


class DatasetImages:
    """
    Images of one split of a dataset, or of a folder. It has the same attributes as [`NpzImages`].

    Without `resolution`, images keep their size. Without `in_channels`, all images are grey if the first one is grey, and in colour
    otherwise.

    Args:
        dataset: Hub id, folder of images, or folder of a dataset.
        options: Split, place and format of the images.
        labelled: Whether to look for labels.

    Raises:
        ValueError: If the split or a column does not exist, or there are no images.
        DatasetNotFoundError: If the dataset does not exist.
    """

    def __init__(self, dataset: str | Path, options: ImageSetOptions | None = None, labelled: bool = False):
        options = options or ImageSetOptions()
        self.name = f"{dataset}, split {options.split}"
        self.format = options.format
        source = replace(options.source, dataset_name=str(dataset))
        self.rows, columns = load_rows(source, options.split, labelled=labelled)
        self.image_column = columns.image
        self.labels = None if columns.label is None else np.asarray(self.rows[columns.label])
        self.class_names = columns.class_names
        self.mixed = (Path(dataset) / "manifest.jsonl").is_file()  # the command `sample` writes one
        if self.mixed:
            self._sort_by_number(dataset)
        self.fingerprint = self.rows._fingerprint
        self.num_images = len(self.rows)
        if not self.num_images:
            raise ValueError(f"{self.name} has no images.")
        first = self._decode(0)
        self.channels = self.format.in_channels or (1 if first.mode in ("1", "L", "LA") or is_deep(first) else 3)
        self.shape = self._read(0).shape

    def _sort_by_number(self, dataset: str | Path) -> None:
        names = [Path(value["path"]).stem for value in self.rows[self.image_column]]
        strange = [name for name in names if not name.isdecimal()]
        if strange:
            raise ValueError(
                f"File names in {dataset} must be numbers, because it has a manifest.jsonl as folders of samples have, but got"
                f" {strange[:3]}."
            )
        order = np.argsort([int(name) for name in names])
        self.rows = self.rows.select(order)
        if self.labels is not None:  # the folder of a class is called by its number
            numbers, self.class_names = np.array([int(name) for name in self.class_names]), None
            self.labels = numbers[self.labels[order]]

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """
        Yields all images in order, `(batch, height, width, channels)` uint8.

        Raises:
            ValueError: If an image is unreadable, or its size or channels differ from those of the first image.
        """
        return self.chosen(np.arange(self.num_images), batch_size)

    def chosen(self, numbers: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Yields some of the images, by their ascending numbers."""
        batches = [numbers[first : first + batch_size].tolist() for first in range(0, len(numbers), batch_size)]
        with ThreadPoolExecutor() as pool:
            following = pool.map(self._read, batches[0]) if batches else None
            for batch, after in itertools.zip_longest(batches, batches[1:], fillvalue=[]):
                images, following = list(following), pool.map(self._read, after)  # read while the caller is at work
                for number, image in zip(batch, images):
                    if image.shape != self.shape:
                        raise ValueError(
                            f"Image {self._file_name(number)} has {_size(image.shape)}, but the first image has"
                            f" {_size(self.shape)}. Pass --resolution."
                        )
                yield np.stack(images)

    def _read(self, number: int) -> np.ndarray:
        image = self._decode(number)
        if self.format.in_channels is None and self.channels == 1 and image.mode in ("RGB", "RGBA", "P", "CMYK"):
            raise ValueError(
                f"Image {self._file_name(number)} is in colour, but the first image is grey. Pass --in_channels."
            )
        try:
            image = to_mode(image, self.channels, self.format.image_range)
            if self.format.resolution is not None:
                image = fit_image(image, self.format)
        except ValueError as error:
            raise ValueError(f"Image {self._file_name(number)}: {error}") from error
        return np.asarray(image).reshape(image.height, image.width, self.channels)

    def _decode(self, number: int) -> Image.Image:
        try:
            return decode(self.rows[number][self.image_column])
        except UnreadableImage as error:
            raise ValueError(f"Image {self._file_name(number)} cannot be read: {error}") from error

    def _file_name(self, number: int) -> str:
        return file_name(self.rows[number][self.image_column], number)


ImageSet = NpzImages | DatasetImages


def open_images(source: str | Path, options: ImageSetOptions | None = None, labelled: bool = False) -> ImageSet:
    """
    Opens a set of images.

    Args:
        source: Path of an `.npz` file, of a folder of images or of a dataset's folder, or id of a dataset on the Hub.
        options: Split, place and format of a dataset's images.
        labelled: Whether to look for labels.

    Raises:
        ValueError: If there are no usable images.
        DatasetNotFoundError: If the dataset does not exist.
        ConnectionError: If the folder does not exist and the Hub cannot be reached.
    """
    if Path(source).suffix == ".npz":
        if not Path(source).is_file():
            raise ValueError(f"The file {source} does not exist.")
        return NpzImages(source, labelled)
    if Path(source).is_file():
        raise ValueError(
            f"Images must be an .npz file, a folder, or the id of a dataset on the Hub, but got the file {source}."
        )
    drawn = sorted(Path(source).glob("samples_*x*x*x*")) if (Path(source) / "settings.json").is_file() else []
    if drawn:
        raise ValueError(f"{source} is the folder of a sampling run. Pass its samples, {drawn[0]}.")
    try:
        return DatasetImages(source, options, labelled)
    except (ConnectionError, DatasetNotFoundError) as error:
        if Path(source).exists():
            raise
        raise type(error)(
            f"There is no folder {str(source)!r}, and no dataset with this id could be loaded from the Hub: {error}"
        ) from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
