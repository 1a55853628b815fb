"""Sets of images to measure or to measure against: `.npz` files, and whatever `datasets.load_dataset` reads."""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_adm.data.datasets import load_rows
from diffusers_adm.data.image_modes import MODES, to_mode
from diffusers_adm.data.images import ImageFormat, UnreadableImage, decode, file_name
from diffusers_adm.data.npz import NpzFile
from diffusers_adm.data.options import ImageSource
from diffusers_adm.options import add_options, build_options


def add_image_set_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `open_images`; without those of size and channels images are taken as they are."""
    parser.add_argument("--split", default="train", help="Of a dataset (default: %(default)s).")
    add_options(parser, ImageSource, title="dataset", without=("dataset_name", "train_data_dir"))
    add_options(parser, ImageFormat, title="image format", resolution=None, in_channels=None)


class NpzImages:
    """
    The images of an `.npz` file: `arr_0` `(images, height, width, channels)` uint8 and, if it is there, `arr_1`, the labels.

    Attributes:
        name: Where the images come from.
        num_images: How many there are.
        shape: `(height, width, channels)` of each.
        labels: Class of each, `(num_images,)`, or `None`; where they were asked for.
        fingerprint: What tells the images from others of the same name.
        mixed: Whether their order says nothing of their classes.

    Args:
        path: Of the file.
        labelled: Whether labels are wanted.

    Raises:
        ValueError: If there are no such arrays in it.
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
        """All images in order, `(batch, height, width, channels)` uint8."""
        return self.file.blocks("arr_0", batch_size)

    def chosen(self, numbers: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Some of the images, by their ascending numbers; of each batch of all of them those that are wanted, if there are any."""
        for first, batch in zip(range(0, self.num_images, batch_size), self.batches(batch_size)):
            wanted = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + len(batch))]
            if len(wanted):
                yield batch[wanted - first]


class DatasetImages:
    """
    The images of one split of a dataset, or of a folder. Attributes are those of [`NpzImages`].

    Args:
        args: Parsed `add_image_set_arguments`, with `dataset_name`. Without `resolution` images keep their size; without
            `in_channels` they are grey if the first is, else colour.
        labelled: Whether to look for labels.

    Raises:
        ValueError: If there is no such split or column, or no image.
        DatasetNotFoundError: If there is no such dataset.
    """

    def __init__(self, args: argparse.Namespace, labelled: bool = False):
        self.args = args
        self.name = f"{args.dataset_name}, split {args.split}"
        self.format = build_options(ImageFormat, args)
        self.rows, columns = load_rows(
            replace(build_options(ImageSource, args), dataset_name=args.dataset_name), args.split, labelled=labelled
        )
        self.image_column = columns.image
        self.labels = None if columns.label is None else np.asarray(self.rows[columns.label])
        self.mixed = (Path(str(args.dataset_name)) / "manifest.jsonl").is_file()
        if self.mixed:  # written by `sample`, whose images bear their numbers
            names = [Path(value["path"]).stem for value in self.rows[self.image_column]]
            strange = [name for name in names if not name.isdecimal()]
            if strange:
                raise ValueError(
                    f"{args.dataset_name} has a manifest.jsonl, as samples have, whose images are called by their numbers: got"
                    f" {strange[:3]}."
                )
            order = np.argsort([int(name) for name in names])
            self.rows = self.rows.select(order)
            self.labels = None if self.labels is None else self.labels[order]
        self.fingerprint = self.rows._fingerprint
        self.num_images = len(self.rows)
        if not self.num_images:
            raise ValueError(f"{self.name} has no images.")
        first = self._decode(0)
        self.channels = args.in_channels or (1 if first.mode in ("1", "L") or first.mode.startswith("I") else 3)
        self.shape = self._read(0).shape

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """
        All images in order, `(batch, height, width, channels)` uint8.

        Raises:
            ValueError: If one is unreadable, or of another size.
        """
        return self.chosen(np.arange(self.num_images), batch_size)

    def chosen(self, numbers: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """Some of the images, by their ascending numbers."""
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(numbers), batch_size):
                batch = numbers[first : first + batch_size].tolist()
                images = list(pool.map(self._read, batch))
                for number, image in zip(batch, images):
                    if image.shape != self.shape:
                        raise ValueError(
                            f"Image {self._file_name(number)} is {_size(image.shape)}, the first is {_size(self.shape)}:"
                            " give --resolution."
                        )
                yield np.stack(images)

    def _read(self, number: int) -> np.ndarray:
        image = self._decode(number)
        if self.args.in_channels is None and self.channels == 1 and image.mode in ("RGB", "RGBA", "P", "CMYK"):
            raise ValueError(f"Image {self._file_name(number)} is in colour, the first is grey: give --in_channels.")
        try:
            image = to_mode(image, self.channels)
            if self.args.resolution is not None:
                image = self.format.fit(image)
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


def open_images(source: str | Path, args: argparse.Namespace, labelled: bool = False) -> ImageSet:
    """
    Args:
        source: An `.npz` file, or what `datasets.load_dataset` reads: a folder of images, a dataset's folder or Hub id.
        args: Parsed `add_image_set_arguments`; for datasets.
        labelled: Whether a dataset's labels are wanted.

    Raises:
        ValueError: If there are no images of one size.
        DatasetNotFoundError: If there is no such dataset.
    """
    if Path(source).suffix == ".npz":
        if not Path(source).is_file():
            raise ValueError(f"There is no file {source}.")
        return NpzImages(source, labelled)
    return DatasetImages(argparse.Namespace(**{**vars(args), "dataset_name": str(source)}), labelled)


def check_changes(args: argparse.Namespace, *sources: str | Path) -> None:
    """Raises a ValueError if the images of sources are to be changed, and all are of `.npz` files, which are taken as they are."""
    given = [name for name in ("resolution", "source_resolution", "in_channels") if getattr(args, name) is not None]
    if given and all(Path(source).suffix == ".npz" for source in sources):
        raise ValueError(
            f"{', '.join(f'--{name}' for name in given)}: for datasets only; the images of an .npz file are taken as they are."
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
