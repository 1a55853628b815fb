"""Shards: batches of images that several processes compute and save, so that an interrupted run continues."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diffusers_adm.atomic_files import remove_partial_files, write_json
from diffusers_adm.command_line import UnusableFolder, describe_error
from diffusers_adm.data.npz import NpzFile, write_npz
from diffusers_adm.records import as_record


# Settings that do not affect the results.
FOR_THE_RECORD = {"model", "source"}


class Shards:
    """
    Folder of a run with one file per batch of images. Batch k begins with image k * batch_size.

    A batch has the same images and the same size for all numbers of processes and of images. Therefore the result of an image does
    not depend on the processes, on interruptions or on the number of images.

    Args:
        folder: Folder of the run. It is created if it does not exist.
        settings: Settings of the run. They are saved in the folder, which then accepts no run with other settings.
        num_images: Number of images.
        batch_size: Number of images per batch.
        state: Processes of the run. All must be able to read and write the folder.

    Raises:
        UnusableFolder: If the folder belongs to a run with other settings, or cannot be used.
    """

    def __init__(self, folder: Path, settings: dict, num_images: int, batch_size: int, state: PartialState):
        if num_images < 1 or batch_size < 1:
            raise ValueError(
                f"The number of images and the batch size must be at least 1, but got {num_images} and {batch_size}."
            )
        self.folder = folder
        self.num_images = num_images
        self.batch_size = batch_size
        self.state = state
        self.settings = json.loads(json.dumps(as_record({**settings, "batch_size": batch_size})))
        # An error must reach all processes. Otherwise, the other processes would wait for ever.
        message = [None]
        if state.is_main_process:
            try:
                self._claim()
            except (ValueError, OSError) as error:
                message = [describe_error(error)]
        broadcast_object_list(message)
        if message[0] is not None:
            raise UnusableFolder(message[0])

    def _claim(self) -> None:
        path = self.folder / "settings.json"
        if path.is_file() and (any(self.folder.glob("shards/[0-9]*.npz")) or any(self.folder.glob("samples_*"))):
            kept = self._kept_settings(path)
            names = sorted({*kept, *self.settings} - FOR_THE_RECORD)
            other = [name for name in names if kept.get(name) != self.settings.get(name)]
            if other:
                differences = ", ".join(
                    f"{name} was {kept.get(name)!r} and is {self.settings.get(name)!r}" for name in other
                )
                raise ValueError(f"{self.folder} holds a run with other settings: {differences}. Pass a new folder.")
        elif self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The output must be a folder, but {self.folder} is a file.")
        elif not path.is_file() and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds files that are not of a run. Pass a new folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings)
        (self.folder / "shards").mkdir(exist_ok=True)
        for folder in (self.folder, self.folder / "shards"):
            remove_partial_files(folder)

    @staticmethod
    def _kept_settings(path: Path) -> dict:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Pass a new folder.") from error
        if not isinstance(kept, dict):
            raise ValueError(f"{path} must hold the settings of a run, but does not. Pass a new folder.")
        return as_record(kept)

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return -(-self.num_images // self.batch_size)

    def numbers(self, batch: int) -> range:
        """Returns the numbers of the images of a batch."""
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def path(self, batch: int) -> Path:
        """Returns the path of a batch's file."""
        return self.folder / "shards" / f"{batch:06d}.npz"

    def missing(self) -> list[int]:
        """Returns the batches whose files are missing."""
        return [batch for batch in range(self.num_batches) if not self.path(batch).is_file()]

    def assigned(self) -> list[int]:
        """Returns this process's share of the missing batches."""
        missing = [self.missing()]
        # All use the list of the main process, because batches may be finished meanwhile.
        broadcast_object_list(missing)
        return missing[0][self.state.process_index :: self.state.num_processes]

    def report_found(self, work: str) -> None:
        """Prints how many images of the run exist already, if any. `work` is the verb for the rest, such as "drawing"."""
        missing = sum(min(self.batch_size, self.num_images - self.numbers(batch).start) for batch in self.missing())
        if self.state.is_main_process and missing < self.num_images:
            found = f"Found {self.num_images - missing} of {self.num_images} images in {self.folder}"
            print(f"{found}, {work} the rest." if missing else f"{found}.", flush=True)

    def save(self, batch: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes the results of a batch. Each array is `(batch_size, ...)`."""
        write_npz(self.path(batch), arrays)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Yields the results of all images, batch by batch. Results beyond the last image are left out."""
        for batch in range(self.num_batches):
            yield NpzFile(self.path(batch)).read(name)[: self.num_images - batch * self.batch_size]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Restricts a process on a CPU to one thread, because the number of threads changes the order of sums and thus their last bits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def image_generator(seed: int, number: int, purpose: int = 0) -> torch.Generator:
    """Returns the generator of one image of a run. Its random numbers are independent of those of other images."""
    (mixed,) = np.random.SeedSequence((seed, number, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) >> 1)  # 63 bits, because torch's seeds are signed
