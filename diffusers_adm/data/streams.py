"""Labelled images that are fetched during training, as a stream. Its position is saved, so that training can resume."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from accelerate import PartialState
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from diffusers_adm.data.images import NO_READABLE_IMAGE, ImageReader


class StreamedImages(torch.utils.data.IterableDataset):
    """
    Endless stream of the labelled images of one split. Each pass has another order.

    The stream is reproducible for the same seed, files, number of processes and number of workers.

    Args:
        rows: Shuffled rows of the dataset, with an undecoded image column.
        reader: Conversion of rows to items.
        seed: Seed of random crops and flips.
        num_workers: Number of workers of the loader.

    Raises:
        ValueError: If the files cannot be divided evenly among the loader's workers.
    """

    num_images = None  # unknown before the stream has ended

    def __init__(self, rows: IterableDataset, reader: ImageReader, seed: int, num_workers: int = 0):
        self.rows = rows
        self.reader = reader
        self.seed = seed
        state = PartialState()
        self.process = state.process_index
        # The share of this process: some of the files if they can be divided evenly, otherwise every n-th image of all files.
        self.share = split_dataset_by_node(rows, rank=state.process_index, world_size=state.num_processes)
        # Start of each worker: the number of its pass, and the number of rows of the pass that are done. Checkpoints store them.
        self.positions = [(0, 0)] * max(1, num_workers)
        check_workers(num_workers, self.share.num_shards)

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class in the order of the labels, or `None` without labels."""
        return self.reader.columns.class_names

    def examples(self, count: int) -> list[dict]:
        """
        Returns the first `count` items of the shuffled stream without augmentation, or all items if there are fewer. They are the
        same on all processes.

        Raises:
            ValueError: If no image can be read.
        """
        reader = dataclasses.replace(self.reader, augment=False)
        items = (reader.read(row, number, "") for number, row in enumerate(copy.deepcopy(self.rows)))
        examples = list(itertools.islice((item for item in items if item is not None), count))
        if not examples:
            raise ValueError(NO_READABLE_IMAGE)
        return examples

    def from_batch(self, loader: DataLoader, number: int) -> Iterator[dict]:
        """
        Yields the batches of a loader, beginning with batch `number`. Earlier rows of a worker's current pass are fetched again, but
        not decoded.

        Args:
            loader: Loader of this stream.
            number: Number of the first batch. `positions` must be the positions of the stream after the previous batch.
        """
        # A loader takes batches from its workers in turn and always begins with the first worker. Therefore positions are kept
        # only when every worker has had its turn.
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
        Yields the items of one worker, each with its position. If `on_unreadable` is `"skip"`, unreadable images are left out.

        Raises:
            ValueError: If an image is unreadable or does not fit the crop, or there is no readable image.
        """
        info = get_worker_info()
        worker = 0 if info is None else info.id  # `datasets` gives each worker its own files of the share
        # Each worker needs its own copy, because workers share the memory of a dataset's epoch and would all advance it.
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
                raise ValueError(NO_READABLE_IMAGE)


def check_workers(num_workers: int, num_files: int) -> None:
    """Raises a ValueError unless the files of a process's stream can be divided evenly among the loader's workers."""
    if num_workers and num_files % num_workers:
        raise ValueError(
            f"--dataloader_num_workers must divide {num_files}, the number of files of each process, because images of some files"
            f" would be seen more often otherwise, but got {num_workers}."
        )
