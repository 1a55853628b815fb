"""Options of image data as a command line gives them, and small datasets."""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from PIL import Image as PILImage

from diffusers_adm.data import datasets
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.options import ImageFormat, ImageSelection, ImageSource
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.options import add_options, build_options


CLASSES = (ImageSource, ImageFormat, ImageSelection)


def arguments(*options: str) -> argparse.Namespace:
    """Returns parsed options with `seed`, for images of 16 pixels."""
    parser = argparse.ArgumentParser()
    for cls in CLASSES:
        add_options(parser, cls)
    args = parser.parse_args([*options, "--resolution", "16"])
    args.seed = 0
    return args


def load_images(
    args: argparse.Namespace, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
    """Opens the images that parsed options name."""
    source, format, selection = (build_options(cls, args) for cls in CLASSES)
    return datasets.load_images(source, format, selection, seed=args.seed, labelled=labelled)


def picture(seed: int, size: tuple[int, int] = (20, 24)) -> PILImage.Image:
    """Returns a coloured picture of noise."""
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def parquet(folder: Path, features: dict, **columns: list) -> str:
    """Writes a dataset of one file, and returns its folder."""
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / "train.parquet")
    return str(folder)
