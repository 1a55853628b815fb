"""Files of random images, and the images that are read from them."""

from pathlib import Path

import numpy as np


def digits_npz(path: Path, images: np.ndarray, **arrays) -> Path:
    np.savez(path, arr_0=images, **arrays)
    return path


def random_images(count: int, seed: int = 0, size: int = 32, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
