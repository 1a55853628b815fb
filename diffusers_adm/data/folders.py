"""Layout of a local folder of images: one subfolder per class, or split folders that hold such subfolders."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Images that `load_dataset` leaves out without a message.
OTHER_IMAGES = (".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".mpo", ".pfm", ".qoi")
OTHER_FORMATS = (".parquet", ".arrow", ".tar", ".gz", ".tgz", ".zip", ".lance")


@dataclass(frozen=True)
class ImageFolderLayout:
    """
    Files of a folder of images.

    Args:
        folder: Path of the folder.
        splits: Subfolders of each split. Empty if all images are in one split.
        links: Subfolders that are links.
        num_images: Number of images on disk.
        has_classes: Whether some images are in a subfolder, of the folder or of a split folder.
        has_metadata: Whether a metadata file lists the images.
    """

    folder: Path
    splits: dict[str, list[str]]
    links: list[Path]
    num_images: int
    has_classes: bool
    has_metadata: bool

    def arguments(self) -> dict:
        """
        Returns arguments for `load_dataset`. They name the files of each split, because `load_dataset` would guess them, and links, which
        it would not follow. The path is absolute, so that the fingerprint of the dataset does not depend on its spelling.
        """
        splits = {split: [Path(name) for name in names] for split, names in self.splits.items()} or {"train": [Path()]}
        patterns = {}
        for split, parents in splits.items():
            links = [link for link in self.links for parent in parents if parent in link.parents]
            patterns[split] = ["/".join([*map(glob.escape, path.parts), "**"]) for path in (*parents, *links)]
        return {
            "path": "imagefolder",
            "data_dir": glob.escape(os.path.abspath(self.folder)),
            "data_files": patterns,
            "drop_labels": None if self.has_classes else True,
        }

    def check_number(self, num_loaded: int) -> None:
        """Raises a ValueError unless all images on disk were loaded. A metadata file may list fewer images."""
        if not self.has_metadata and num_loaded != self.num_images:
            raise ValueError(
                f"{self.folder} has {self.num_images} image files, but {num_loaded} were loaded. Remove unusual characters"
                " from the names of folders, or pass --data_files."
            )


def find_layout(folder: str | Path, images_only: bool = False) -> ImageFolderLayout | None:
    """
    Returns the layout of a folder of images, or `None` if the path is not a folder or holds a dataset of another format.

    Args:
        folder: Path of the folder.
        images_only: Whether to refuse datasets of other formats beside images.

    Raises:
        ValueError: If the folder has both split folders and other images, so that the split of the other images is unclear, a dataset
            of another format is refused, or `datasets` would leave out some of the images.
    """
    folder = Path(folder)
    files, links = _visible_files(folder)
    images = [path for path in files if path.suffix.lower() in ImageFolder.EXTENSIONS]
    others = [path for path in files if path.suffix.lower() in OTHER_FORMATS and path.stem != "metadata"]
    if images and others and images_only:
        raise ValueError(
            f"--train_data_dir {folder} must hold only images, but also holds {others[0]}. Move it out of the folder, or say which files"
            " to read with --data_files."
        )
    left_out = [path for path in files if path.suffix.lower() in OTHER_IMAGES]
    if left_out and not others:
        raise ValueError(
            f"{folder} has {len(left_out)} images of formats that `datasets` does not read, such as {left_out[0]}. Convert them to PNG or"
            " JPEG, or move them out of the folder."
        )
    if not images or others:
        return None
    readme = folder / "README.md"
    if readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), re.MULTILINE):
        return None  # the dataset card lists the splits
    splits = _find_splits(folder, images)
    return ImageFolderLayout(
        folder=folder,
        splits=splits,
        links=links,
        num_images=len(images),
        has_classes=any(len(path.parts) > (2 if splits else 1) for path in images),
        has_metadata=any(path.name in ImageFolder.METADATA_FILENAMES for path in files),
    )


def _find_splits(folder: Path, images: list[Path]) -> dict[str, list[str]]:
    """Returns the subfolders of each split. If there are other images too, a folder such as `test` is a class, not a split."""
    subfolders = sorted({path.parts[0] for path in images if len(path.parts) > 1})
    with_classes = {path.parts[0] for path in images if len(path.parts) > 2}
    found = {name: _split_of(name, name in with_classes) for name in subfolders}
    others = [name for name, split in found.items() if split is None]
    loose = [path.name for path in images if len(path.parts) == 1]
    if others or loose:
        unclear = [name for name, split in found.items() if split is not None and name in with_classes]
        if unclear:
            raise ValueError(
                f"{folder} has both split folders, {unclear}, and other images, {(others + loose)[:3]}. Keep one of the two, or"
                " pass --data_files."
            )
        return {}
    splits: dict[str, list[str]] = {}
    for name, split in found.items():
        splits.setdefault(split, []).append(name)
    return splits


def _split_of(name: str, with_classes: bool) -> str | None:
    """Returns the split that a folder's name means. A name with more words, as `train_images`, counts only with class folders."""
    words = set(re.findall("[a-z]+", name.lower()))
    splits = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
    return splits.pop() if len(splits) == 1 and (with_classes or len(words) == 1) else None


def _visible_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """
    Returns the files below a folder, and those of its subfolders that are links, relative to it. Files that `load_dataset` regards as
    hidden, and links to a folder above, are left out.
    """
    files, links = [], []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        linked = {name for name in subfolders if os.path.islink(os.path.join(parent, name))}
        parents = [Path(parent), *Path(parent).parents] if linked else []
        above = {name for name in linked if any(Path(parent, name).samefile(one) for one in parents)}
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__")) and name not in above]
        links += [Path(parent, name).relative_to(folder) for name in subfolders if name in linked]
        files += [Path(parent, name).relative_to(folder) for name in names if not name.startswith(".")]
    return files, links
