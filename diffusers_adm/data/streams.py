"""Labelled images that are fetched during training, in a stream that is known by its position."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from accelerate import PartialState
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from diffusers_adm.data.images import ImageReader


class StreamedImages(torch.utils.data.IterableDataset):
    """
    Labelled images of one split in an endless stream, each pass in another order.

    With the same seed, files, processes and workers the stream is the same.

    Args:
        rows: Shuffled rows of the dataset, with an undecoded image column.
        reader: Conversion of rows to items.
        seed: Seed of random crops and flips.
        num_workers: Number of the loader's workers.

    Raises:
        ValueError: If the files cannot be divided evenly among the loader's workers.
    """

    num_images = None  # known when the stream ends at the earliest

    def __init__(self, rows: IterableDataset, reader: ImageReader, seed: int, num_workers: int = 0):
        self.rows = rows
        self.reader = reader
        self.seed = seed
        state = PartialState()
        self.process = state.process_index
        # Files of its own if they can be divided evenly; otherwise every n-th image of all files.
        self.share = split_dataset_by_node(rows, rank=state.process_index, world_size=state.num_processes)
        # Where each worker begins: its pass, and how many rows of that are done. A checkpoint keeps them.
        self.positions = [(0, 0)] * max(1, num_workers)
        check_workers(num_workers, self.share.num_shards)

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class in the order of the labels, or `None` without labels."""
        return self.reader.columns.class_names

    def examples(self, count: int) -> list[dict]:
        """
        Returns the first `count` items of the shuffled stream, or as many as there are, without augmentation. They are the
        same on all processes.

        Raises:
            ValueError: If none can be read.
        """
        reader = dataclasses.replace(self.reader, augment=False)
        items = (reader.read(row, number, "") for number, row in enumerate(copy.deepcopy(self.rows)))
        examples = list(itertools.islice((item for item in items if item is not None), count))
        if not examples:
            raise ValueError("No image of the dataset can be read.")
        return examples

    def from_batch(self, loader: DataLoader, number: int) -> Iterator[dict]:
        """
        Yields the batches of this stream's loader from a given one on. Earlier rows of a worker's current pass are fetched
        again, but not decoded.

        Args:
            loader: Loader of this stream.
            number: Number of the batch. `positions` must be those that the stream had after the batch before.
        """
        # A loader takes batch after batch from the workers in turn, and always begins with the first: what is kept are
        # positions between two turns.
        workers = len(self.positions)
        latest = list(self.positions)
        for index, batch in enumerate(loader):
            latest[index % workers] = tuple(batch.pop("position")[-1].tolist())
            if (index + 1) % workers == 0:
                self.positions = list(latest)
            if index >= number % workers:
                yield batch

    def __iter__(self) -> Iterator[dict]:
        """
        Yields the items of one worker, each with its position, without unreadable ones if `on_unreadable` is `"skip"`.

        Raises:
            ValueError: If an image is unreadable, or does not fit the crop, or there is none.
        """
        info = get_worker_info()
        worker = 0 if info is None else info.id  # the share gives each files of its own
        # Workers share the memory of a dataset's epoch, and would count it on for each other.
        rows = copy.deepcopy(self.share)
        first_epoch, rows_passed = self.positions[worker]
        for epoch in itertools.count(first_epoch):
            rows.set_epoch(epoch)
            has_images = False
            for number, row in enumerate(rows):
                if rows_passed:
                    rows_passed -= 1
                    has_images = True
                    continue
                item = self.reader.read(row, number, f"{self.seed}-{epoch}-{self.process}-{worker}-{number}")
                if item is not None:
                    has_images = True
                    yield {**item, "position": torch.tensor((epoch, number + 1))}
            if not has_images:
                raise ValueError("No image of the dataset can be read.")


def check_workers(num_workers: int, num_files: int) -> None:
    """Raises a ValueError unless the files of a process's stream can be divided evenly among the loader's workers."""
    if num_workers and num_files % num_workers:
        raise ValueError(
            f"--dataloader_num_workers {num_workers} does not divide the number of files that each process reads,"
            f" {num_files}: batches come from the workers in turn, and images of some files would be seen more often."
        )
