"""Files of samples: an `.npz` file as the original code writes it, PNG files, and a grid."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_adm.atomic_files import atomic_folder, atomic_write
from diffusers_adm.data.grids import grid_of
from diffusers_adm.data.image_modes import MODES
from diffusers_adm.data.npz import NpzFile, Rows, write_npz
from diffusers_adm.evaluation.shards import Shards


IMAGES_OF_A_GRID = 100


def sample_path(folder: Path, num_images: int, size: tuple[int, int, int], format: str) -> Path:
    """
    Returns the path of a run's samples, `samples_NxHxWxC.npz` or the folder `samples_NxHxWxC`.

    Args:
        folder: Folder of the run.
        num_images: Number of images.
        size: Size of the images, `(height, width, channels)`.
        format: Format of the files, one of `evaluation.options.FORMATS`.

    Raises:
        ValueError: If the format is PNG, and the images have neither 1 nor 3 channels.
    """
    if format == "png" and size[2] not in MODES:
        raise ValueError(f"--format png requires images of 1 or 3 channels, but the UNet has {size[2]}. Pass npz.")
    shape = "x".join(map(str, (num_images, *size)))
    return folder / f"samples_{shape}{'.npz' if format == 'npz' else ''}"


def as_8_bit(x_0: torch.Tensor) -> np.ndarray:
    """
    Converts images in [-1, 1], `(batch, channels, height, width)`, to 8 bits, `(batch, height, width, channels)`. Values are rounded
    down, as in the original code.
    """
    return ((x_0.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_samples(shards: Shards, path: Path) -> None:
    """
    Writes the samples of all shards. If writing fails, no file is left. Images of 1 or 3 channels also get a grid of the first ones.

    Args:
        shards: Shards of a run.
        path: Path of an `.npz` file, or of a folder for PNG files.

    Raises:
        ValueError: If some batches are missing.
    """
    missing = shards.missing()
    if missing:
        raise ValueError(
            f"{len(missing)} of {shards.num_batches} batches are missing in {shards.folder}. Run the command again."
        )
    first = NpzFile(shards.path(0))
    labelled = "arr_1" in first
    if first.header("arr_0")[0][-1] in MODES:
        pictures = [to_picture(image) for image in itertools.islice(_single(shards, "arr_0"), IMAGES_OF_A_GRID)]
        with atomic_write(shards.folder / "grid.png") as partial:
            grid_of(pictures).save(partial, format="PNG")
    if path.suffix == ".npz":
        shape, dtype = first.header("arr_0")
        arrays: dict[str, np.ndarray | Rows] = {
            "arr_0": Rows((shards.num_images, *shape[1:]), dtype, shards.rows("arr_0"))
        }
        if labelled:
            arrays["arr_1"] = np.concatenate(list(shards.rows("arr_1")))
        arrays["metadata"] = np.array(json.dumps({**shards.settings, "num_images": shards.num_images}))
        write_npz(path, arrays)
    else:
        write_png(path, _single(shards, "arr_0"), _single(shards, "arr_1") if labelled else itertools.repeat(None))


def write_png(folder: Path, images: Iterator[np.ndarray], labels: Iterator[int | None]) -> None:
    """
    Writes `images/<label>/<number>.png`, and `manifest.jsonl` with the file, number and label of each image.

    Args:
        folder: Folder of the files.
        images: 8-bit images, `(height, width, 1 or 3)` each.
        labels: Label of each image, or `None`.
    """
    with atomic_folder(folder) as partial:
        partial.mkdir()
        with open(partial / "manifest.jsonl", "w", encoding="utf-8") as manifest:
            for number, (image, label) in enumerate(zip(images, labels)):
                label = None if label is None else int(label)
                file = Path("images", "" if label is None else f"{label:04d}", f"{number:06d}.png")
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                to_picture(image).save(partial / file)
                manifest.write(json.dumps({"file_name": file.as_posix(), "number": number, "label": label}) + "\n")


def to_picture(image: np.ndarray) -> Image.Image:
    """Converts 8-bit pixels, `(height, width, 1 or 3)`, to a PIL image."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _single(shards: Shards, name: str) -> Iterator[np.ndarray]:
    return itertools.chain.from_iterable(shards.rows(name))
