"""Paths of a guided teacher, which are drawn once and stored in the folder of a run."""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from diffusers_adm.atomic_files import atomic_write
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.progress import with_progress
from diffusers_adm.training.configuration import as_yaml, contradictions
from diffusers_adm.training.consistency import Teacher, first_levels, follow, path_levels
from diffusers_adm.training.consistency_options import ConsistencyTrainingOptions


PATHS_PER_FILE = 64


class StoredPaths(torch.utils.data.Dataset):
    """
    Points of paths, with the ends of the paths.

    Args:
        files: Files of `draw_paths`.
        class_names: Name of each class in the order of the labels, or `None` without labels.
    """

    def __init__(self, files: list[Path], class_names: list[str] | None):
        parts = [load_file(file) for file in files]
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.num_points = self.tensors["sigma"].shape[1] - 1
        self.class_names = class_names

    @property
    def num_images(self) -> int:
        """Number of points. The ends of the paths are left out."""
        return len(self.tensors["sigma"]) * self.num_points

    def __len__(self) -> int:
        return self.num_images

    def set_epoch(self, epoch: int) -> None:
        """Does nothing, because points are not augmented."""

    def __getitem__(self, index: int) -> dict:
        """Returns a point `image`, its noise level `sigma`, the end `target` of its path, and its `label`."""
        path, point = divmod(index, self.num_points)
        points, sigma = self.tensors["points"][path], self.tensors["sigma"][path]
        item = {"image": points[point].float(), "sigma": sigma[point], "target": points[-1].float()}
        return item | {name: self.tensors[name][path] for name in ("label",) if name in self.tensors}


def stored_paths(
    options: ConsistencyTrainingOptions,
    images: LabelledImages,
    teacher: Teacher,
    accelerator: Accelerator,
) -> StoredPaths:
    """
    Returns the paths of a run. Paths that are not stored yet are drawn.

    Args:
        options: Options of the run.
        images: Training images, where the paths begin.
        teacher: Guided prediction of x_0.
        accelerator: Accelerator of the script.

    Raises:
        ValueError: If the stored paths were drawn with other options.
    """
    folder = options.output.output_dir / "paths"
    numbers = range(-(-options.teacher.num_paths // PATHS_PER_FILE))
    files = [folder / f"paths-{number:05}.safetensors" for number in numbers]
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            _reserve(folder, options)
            missing = [number for number in numbers if not files[number].exists()]
            for number in with_progress(iter(missing), len(missing), "drawing paths", "files"):
                tensors = draw_paths(options, images, teacher, number, accelerator.device)
                with atomic_write(files[number]) as partial:
                    save_file(tensors, partial)
    return StoredPaths(files, images.class_names)


def _reserve(folder: Path, options: ConsistencyTrainingOptions) -> None:
    """Writes the options of the paths, or compares them with those of paths that are stored already."""
    record = folder / "options.yaml"
    if record.exists():
        differing = contradictions(options, record.read_text())
        if differing:
            raise ValueError(
                f"{folder} holds paths of other options: {', '.join(differing)}. Remove it, or pass another --output_dir."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(record) as partial:
        partial.write_text(as_yaml(options))


def draw_paths(
    options: ConsistencyTrainingOptions,
    images: LabelledImages,
    teacher: Teacher,
    number: int,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """
    Draws the paths of one file. Images, noise levels and noise depend only on the seed of the run and the number of the file.

    Args:
        options: Options of the run.
        images: Images where the paths begin.
        teacher: Guided prediction of x_0.
        number: Number of the file.
        device: Device of the teacher.

    Returns:
        Points of the paths in half precision, `points`, `(paths, steps + 1, channels, height, width)`, their noise levels `sigma`,
        `(paths, steps + 1)`, and `label`, `(paths,)`. With chosen levels, only both ends of the paths.
    """
    count = min(PATHS_PER_FILE, options.teacher.num_paths - number * PATHS_PER_FILE)
    generator = torch.Generator().manual_seed(1_000_003 * options.optimisation.seed + number)
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
    labels = batch["label"].to(device) if "label" in batch else None
    with torch.no_grad():
        points = follow(lambda x, sigma: teacher(x, sigma, labels), x.to(device), path.to(device))
    if chosen is not None:
        points, path = points[[0, -1]], path[[0, -1]]  # the model learns nowhere else
    tensors = {"points": points.cpu().half().transpose(0, 1), "sigma": path.T}
    if labels is not None:
        tensors["label"] = batch["label"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
