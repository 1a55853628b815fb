"""Paths of a guided teacher, which are drawn once and stored in the folder of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from diffusers_adm.atomic_files import atomic_write
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.options import option_values
from diffusers_adm.progress import with_progress
from diffusers_adm.training.configuration import as_yaml, contradictions, read_table
from diffusers_adm.training.consistency import Teacher, first_levels, follow, path_levels
from diffusers_adm.training.consistency_options import ConsistencyTrainingOptions
from diffusers_adm.training.setup import check_number_of_images


PATHS_PER_FILE = 64
HELD_OUT_SEED = 500_000  # added to the numbers of files of held-out images
RECORD_FILE = "options.yaml"
# Keys of what decides the paths beside the options, and its name in messages.
OTHER_RECORDS = {
    "teacher": "the teacher's weights or scheduler",
    "images": "the number or the classes of the images",
    "precision": "the precision",
}
# Options that decide the paths, beside those of the images, the classes and the teacher.
OTHERS_THAT_DECIDE = ("seed", "sigma_min", "sigma_max", "log_sigma_mean", "log_sigma_std")


class StoredPaths(torch.utils.data.Dataset):
    """
    Points of paths, with the ends of the paths.

    Args:
        parts: Results of `draw_paths`.
        class_names: Name of each class in the order of the labels, or `None` without labels.
        num_paths: Number of paths. If fewer were drawn, they are repeated. `None` means those of the parts.
    """

    def __init__(
        self, parts: list[dict[str, torch.Tensor]], class_names: list[str] | None, num_paths: int | None = None
    ):
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        drawn, num_levels = self.tensors["sigma"].shape
        self.num_drawn, self.num_points = drawn, num_levels - 1
        self.num_paths = drawn if num_paths is None else num_paths
        self.class_names = class_names

    @property
    def num_images(self) -> int:
        """Number of points. The ends of the paths are left out."""
        return self.num_paths * self.num_points

    def __len__(self) -> int:
        return self.num_images

    def set_epoch(self, epoch: int) -> None:
        """Does nothing, because points are not augmented."""

    def __getitem__(self, index: int) -> dict:
        """Returns a point `image`, its noise level `sigma`, the end `target` of its path, and its `label`."""
        path, point = divmod(index, self.num_points)
        path %= self.num_drawn
        points, sigma = self.tensors["points"][path], self.tensors["sigma"][path]
        item = {"image": points[point].float(), "sigma": sigma[point], "target": points[-1].float()}
        return item | {name: self.tensors[name][path] for name in ("label",) if name in self.tensors}


@dataclass(frozen=True)
class PathFile:
    """
    File of stored paths.

    Args:
        path: Path of the file.
        images: Images where its paths begin.
        seed: Seed of the file.
        count: Number of its paths.
    """

    path: Path
    images: LabelledImages
    seed: int
    count: int


def stored_paths(
    options: ConsistencyTrainingOptions,
    images: LabelledImages,
    held_out: LabelledImages | None,
    teacher: Teacher,
    accelerator: Accelerator,
) -> tuple[StoredPaths, StoredPaths | None]:
    """
    Returns the paths of a run: those of training images, and a tenth as many of held-out images. Paths that are not stored yet are
    drawn. In a dry run, one path stands for all.

    Args:
        options: Options of the run.
        images: Training images, where the paths begin.
        held_out: Held-out images.
        teacher: Guided prediction of x_0.
        accelerator: Accelerator of the script.

    Raises:
        ValueError: If there are too few paths for a batch, or the stored paths were drawn with other options, from other images or by
            another teacher.
    """
    folder, num_paths = options.output.output_dir / "paths", options.teacher.num_paths
    points_per_path = options.teacher.teacher_steps if options.teacher.path_levels is None else 1
    batch_size, num_processes = options.optimisation.train_batch_size, accelerator.num_processes
    check_number_of_images(batch_size, num_paths * points_per_path, num_processes)  # before hours of drawing
    trained, validated = _files(folder, "paths", images, num_paths, 0), []
    if held_out is not None:
        fewest = len(options.teacher.path_levels or (None,))  # one at each level
        validated = _files(folder, "held-out", held_out, max(-(-num_paths // 10), fewest), HELD_OUT_SEED)

    def draw(file: PathFile, count: int) -> dict[str, torch.Tensor]:
        return draw_paths(options, file.images, teacher, file.seed, count, accelerator.device)

    def read(files: list[PathFile]) -> StoredPaths:
        if options.dry_run:
            return StoredPaths([draw(files[0], 1)], images.class_names, sum(file.count for file in files))
        return StoredPaths([load_file(file.path) for file in files], images.class_names)

    if accelerator.is_main_process:
        others = {
            "teacher": teacher.record(),
            "images": [images.num_images, images.class_names],
            "precision": accelerator.mixed_precision,
        }
        is_new = not _are_stored(folder, options, others)
        if is_new and not options.dry_run:
            _write_record(folder, options, others)
    accelerator.wait_for_everyone()
    if not options.dry_run:
        share = (trained + validated)[accelerator.process_index :: num_processes]
        missing = [file for file in share if not file.path.exists()]
        if accelerator.is_main_process:
            missing = with_progress(missing, len(missing), "drawing paths", "files")
        for file in missing:
            with atomic_write(file.path) as partial:
                save_file(draw(file, file.count), partial)
        accelerator.wait_for_everyone()
    return read(trained), read(validated) if validated else None


def _files(folder: Path, name: str, images: LabelledImages, num_paths: int, first_seed: int) -> list[PathFile]:
    """Returns the files of a number of paths."""
    counts = [min(PATHS_PER_FILE, num_paths - first) for first in range(0, num_paths, PATHS_PER_FILE)]
    return [
        PathFile(folder / f"{name}-{number:05}.safetensors", images, first_seed + number, count)
        for number, count in enumerate(counts)
    ]


def _are_stored(folder: Path, options: ConsistencyTrainingOptions, others: dict[str, Any]) -> bool:
    """Returns whether paths are stored already. Raises a ValueError if other options, images or another teacher decided them."""
    record = folder / RECORD_FILE
    if not (record.exists() and any(folder.glob("*.safetensors"))):
        return False
    text = record.read_text()
    differing = contradictions(options, text)
    recorded = read_table(text, RECORD_FILE)
    differing += [OTHER_RECORDS[name] for name, value in others.items() if recorded.get(name, value) != value]
    if differing:
        raise ValueError(
            f"{folder} holds paths of other options: {', '.join(differing)}. Remove it, or pass another --output_dir."
        )
    return True


def _write_record(folder: Path, options: ConsistencyTrainingOptions, others: dict[str, Any]) -> None:
    """Writes the options that decide the paths, and what else does."""
    groups = (options.source, options.format, options.selection, options.classes, options.teacher)
    deciding = {*OTHERS_THAT_DECIDE, *(name for group in groups for name in option_values(group))}
    values = {name: value for name, value in yaml.safe_load(as_yaml(options)).items() if name in deciding}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RECORD_FILE) as partial:
        partial.write_text(yaml.safe_dump({**values, **others}, sort_keys=False))


def draw_paths(
    options: ConsistencyTrainingOptions,
    images: LabelledImages,
    teacher: Teacher,
    seed: int,
    count: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """
    Draws the paths of one file. Images, noise levels and noise depend only on the seeds of the run and of the file.

    Args:
        options: Options of the run.
        images: Images where the paths begin.
        teacher: Guided prediction of x_0.
        seed: Seed of the file.
        count: Number of paths.
        device: Device of the teacher.

    Returns:
        Points of the paths in half precision, `points`, `(paths, steps + 1, channels, height, width)`, their noise levels `sigma`,
        `(paths, steps + 1)`, and `label`, `(paths,)`. With chosen levels, only both ends of the paths.
    """
    generator = torch.Generator().manual_seed(1_000_003 * options.optimisation.seed + seed)
    rows = torch.randint(len(images), (count,), generator=generator).tolist()
    batch = default_collate([images[row] for row in rows])
    sigma = first_levels(options.consistency, torch.randn(count, generator=generator))
    chosen = options.teacher.path_levels
    if chosen is not None:
        sigma = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
    lowest = torch.full_like(sigma, options.consistency.sigma_min)
    path = path_levels(sigma, lowest, options.teacher.teacher_steps, teacher.schedule)  # (steps + 1, paths)
    noise = torch.randn(batch["image"].shape, generator=generator)
    x = batch["image"] + sigma[:, None, None, None] * noise
    label = batch.get("label")  # (paths,)

    def draw(some: torch.Tensor) -> torch.Tensor:
        labels = None if label is None else label[some].to(device)
        points = follow(lambda x, sigma: teacher(x, sigma, labels), x[some].to(device), path[:, some].to(device))
        return points.cpu().half()  # (steps + 1, some, channels, height, width)

    batches = torch.arange(count).split(options.optimisation.train_batch_size)  # all at once might not fit in memory
    with torch.no_grad():
        points = torch.cat([draw(some) for some in batches], dim=1)
    if chosen is not None:
        points, path = points[[0, -1]], path[[0, -1]]  # the model learns nowhere else
    tensors = {"points": points.transpose(0, 1), "sigma": path.T}
    if label is not None:
        tensors["label"] = label
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
