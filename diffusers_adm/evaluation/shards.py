"""Work on many images that is dealt to processes batch by batch, and goes on where it was stopped."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from diffusers_adm.atomic_files import write_json
from diffusers_adm.data.npz import NpzFile, write_npz


# Settings that change nothing of what is computed.
FOR_THE_RECORD = {"model"}


class Shards:
    """
    A folder with one file for each batch of image numbers: batch k is of the images from k * batch_size on.

    A batch is always of the same numbers and of the same size, whatever process works on it, and whatever the number of
    images: what is computed of an image depends neither on the processes nor on interruptions.

    Args:
        folder: Of the run; made if it does not exist.
        settings: Of the run; the folder keeps them, and takes no other run's batches.
        num_images: How many are wanted.
        batch_size: Images of a batch.
        state: The processes of the run, which must all see the folder.

    Raises:
        ValueError: If the folder is of a run of other settings, or holds other files.
    """

    def __init__(self, folder: Path, settings: dict, num_images: int, batch_size: int, state: PartialState):
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"{num_images} images in batches of {batch_size}: both must be at least 1.")
        self.folder = folder
        self.num_images = num_images
        self.batch_size = batch_size
        self.state = state
        self.settings = json.loads(json.dumps({**settings, "batch_size": batch_size}, default=as_plain))
        # A refusal must reach all processes, or the others would wait for ever.
        refusal = [None]
        if state.is_main_process:
            try:
                self._claim()
            except ValueError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise ValueError(refusal[0])

    def _claim(self) -> None:
        path = self.folder / "settings.json"
        if path.is_file() and (any(self.folder.glob("shards/0*.npz")) or any(self.folder.glob("samples_*"))):
            kept = json.loads(path.read_text(encoding="utf-8"))
            names = sorted({*kept, *self.settings} - FOR_THE_RECORD)
            other = [name for name in names if kept.get(name) != self.settings.get(name)]
            if other:
                differences = ", ".join(
                    f"{name} {kept.get(name)!r}, not {self.settings.get(name)!r}" for name in other
                )
                raise ValueError(f"{self.folder} is of a run of other settings: {differences}. Take a new folder.")
        elif not path.is_file() and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds files of something else: take a new folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings)
        (self.folder / "shards").mkdir(exist_ok=True)
        for partial in (*self.folder.glob("partial-*"), *self.folder.glob("shards/partial-*")):
            if partial.is_file():
                partial.unlink()  # of a process that was killed

    @property
    def num_batches(self) -> int:
        """How many there are."""
        return -(-self.num_images // self.batch_size)

    def numbers(self, batch: int) -> range:
        """The images of a batch."""
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def path(self, batch: int) -> Path:
        """The file of a batch."""
        return self.folder / "shards" / f"{batch:06d}.npz"

    def missing(self) -> list[int]:
        """The batches that are not there yet."""
        return [batch for batch in range(self.num_batches) if not self.path(batch).is_file()]

    def dealt(self) -> list[int]:
        """This process's share of the missing batches."""
        missing = [self.missing()]
        broadcast_object_list(missing)  # what the main process saw: others may finish one meanwhile
        return missing[0][self.state.process_index :: self.state.num_processes]

    def save(self, batch: int, arrays: dict[str, np.ndarray]) -> None:
        """Keeps what was computed of a batch, `(batch_size, ...)` each."""
        write_npz(self.path(batch), arrays)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """What was computed of all images, batch by batch, without what is beyond the last image."""
        for batch in range(self.num_batches):
            yield NpzFile(self.path(batch)).read(name)[: self.num_images - batch * self.batch_size]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread a process on a CPU, where the number of threads changes the order of sums, and so the last bits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def image_generator(seed: int, number: int, purpose: int = 0) -> torch.Generator:
    """The random numbers of one image of a run, apart from all others."""
    (mixed,) = np.random.SeedSequence((seed, number, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) >> 1)  # torch takes signed numbers


def weights_digest(modules: dict[str, torch.nn.Module | None]) -> str:
    """What tells weights from others."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in sorted(modules.items()):
        if isinstance(module, torch.nn.Module):
            for key, tensor in module.state_dict().items():
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def as_plain(value):
    """A number or a list of what is neither for JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
