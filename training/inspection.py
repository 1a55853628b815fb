"""What a training run would see of a dataset."""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm

from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.images import UnreadableImage, decode, file_name
from diffusers_adm.training.arguments import add_data_arguments, load_images_of


def add_inspection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect_data`."""
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="Of what is held out or chosen at random.")


def inspect_data(args: argparse.Namespace) -> None:
    """
    Prints classes and their counts, sizes, modes and unreadable files of the images to train on, and of those held out.

    Args:
        args: Parsed `add_inspection_arguments`.

    Raises:
        ValueError: If the dataset cannot be used at all.
    """
    if args.streaming:
        raise ValueError("inspect-data reads all images: leave --streaming out.")
    images, held_out = load_images_of(args)
    print_summary("Training", images)
    if held_out is not None:
        print_summary("Held out", held_out)


def print_summary(title: str, images: LabelledImages) -> None:
    """Reads every image, and prints what there is."""

    def read(index: int) -> tuple[tuple[int, int] | None, str]:
        value = images.rows[index][images.reader.columns.image]
        try:
            image = decode(value)
        except UnreadableImage as error:
            return None, f"{file_name(value, index)}: {error}"
        return image.size, image.mode

    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(read, range(len(images))), total=len(images), unit="image", disable=None))
    sizes = Counter(size for size, _ in found if size is not None)
    modes = Counter(mode for size, mode in found if size is not None)
    unreadable = [message for size, message in found if size is None]

    print(f"{title}: {len(images)} images")
    if images.class_names is None:
        print("  no labels")
    else:
        counts = Counter(images.rows[images.reader.columns.label])
        print(f"  {len(images.class_names)} classes: images, number, name")
        for label, name in enumerate(images.class_names):
            print(f"    {counts[label]:>8} {label:>5} {name}")
    print(f"  {len(sizes)} sizes (width x height): {_most_common(sizes, 'x')}")
    format = images.reader.format
    resolution = format.source_resolution or format.resolution
    small = sum(count for size, count in sizes.items() if min(size) < resolution)
    if small and format.crop != "pad":
        print(f"  {small} smaller than {resolution} pixels, which would be enlarged")
    print(f"  modes: {_most_common(modes)}")
    print(f"  {len(unreadable)} unreadable")
    for message in unreadable:
        print(f"    {message}")


def _most_common(counts: Counter, separator: str | None = None, limit: int = 8) -> str:
    shown = [
        f"{value if separator is None else separator.join(map(str, value))} ({count})"
        for value, count in counts.most_common(limit)
    ]
    return ", ".join(shown + ["..."] * (len(counts) > limit))
