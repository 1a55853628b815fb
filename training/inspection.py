"""Summary of a dataset to train on."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.image_modes import is_deep, to_mode
from diffusers_adm.data.images import UnreadableImage, decode, file_name
from diffusers_adm.progress import with_progress


@dataclass(frozen=True)
class Reading:
    """
    Facts of one image.

    Args:
        size: Width and height in pixels, or `None` for an unreadable image.
        mode: Mode of the image in PIL, such as `"RGB"`.
        extremes: Lowest and highest value, for images of more than 8 bits.
        problem: Reason why training would not use the image.
    """

    size: tuple[int, int] | None = None
    mode: str | None = None
    extremes: tuple[float, float] | None = None
    problem: str | None = None


def read_image(images: LabelledImages, index: int) -> Reading:
    """Reads one image and returns its facts."""
    value, format = images.rows[index][images.reader.columns.image], images.reader.format
    extremes = problem = None
    try:
        image = decode(value)
        if is_deep(image):
            extremes = image.getextrema()
            to_mode(image, format.in_channels, format.image_range)
    except UnreadableImage as error:
        return Reading(problem=f"{file_name(value, index)}: {error}")
    except ValueError as error:
        problem = f"{file_name(value, index)}: {error}"
    return Reading(image.size, image.mode, extremes, problem)


def print_summary(title: str, images: LabelledImages) -> None:
    """Reads all images, and prints their summary."""
    columns, format = images.reader.columns, images.reader.format
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda index: read_image(images, index), range(len(images)))
        readings = list(with_progress(found, len(images), "reading", "images"))
    sizes = Counter(reading.size for reading in readings if reading.size is not None)
    modes = Counter(reading.mode for reading in readings if reading.size is not None)
    unreadable = [reading.problem for reading in readings if reading.size is None]

    print(f"{title}: {len(images)} images")
    if images.class_names is None:
        print("  no labels")
    else:
        counts = Counter(images.rows[columns.label])
        print(f"  {len(images.class_names)} classes: images, number, name")
        for label, name in enumerate(images.class_names):
            print(f"    {counts[label]:>8} {label:>5} {name}")
    print(f"  {len(sizes)} sizes (width x height): {_most_common(sizes, 'x')}")
    resolution = format.source_resolution or format.resolution
    small = sum(count for size, count in sizes.items() if min(size) < resolution)
    large = sum(count for size, count in sizes.items() if max(size) > resolution)
    if small and format.crop != "pad":
        print(f"  {small} smaller than {resolution} pixels: they would be enlarged")
    if large and format.crop == "pad":
        print(f"  {large} larger than {resolution} pixels: --crop pad would refuse them")
    print(f"  modes: {_most_common(modes)}")
    _print_deep_images([reading for reading in readings if reading.extremes is not None])
    print(f"  {len(unreadable)} unreadable")
    for message in unreadable:
        print(f"    {message}")


def _print_deep_images(readings: list[Reading]) -> None:
    if not readings:
        return
    lowest, highest = (extreme(values) for extreme, values in zip((min, max), zip(*(r.extremes for r in readings))))
    refused = [reading.problem for reading in readings if reading.problem is not None]
    print(f"  {len(readings)} of more than 8 bits, values in [{lowest:g}, {highest:g}], {len(refused)} refused")
    for problem in refused[:1]:
        print(f"    {problem}")


def _most_common(counts: Counter, separator: str | None = None, limit: int = 8) -> str:
    shown = [
        f"{value if separator is None else separator.join(map(str, value))} ({count})"
        for value, count in counts.most_common(limit)
    ]
    return ", ".join(shown + ["..."] * (len(counts) > limit))
