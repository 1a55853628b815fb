"""Table of released checkpoints: their addresses, flags and published scores.

The rows are in `released_guided` (openai/guided-diffusion), `released_family` (openai/improved-diffusion and
openai/consistency_models) and `released_community`.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released_community import COMMUNITY
from diffusers_adm.openai.released_family import CONSISTENCY_MODELS, IMPROVED_DIFFUSION
from diffusers_adm.openai.released_guided import GUIDED_DIFFUSION
from diffusers_adm.openai.released_rows import ReleasedCheckpoint, tensor_layout


# Checkpoints of the paper, by file name.
RELEASED_CHECKPOINTS = {released.file: released for released in GUIDED_DIFFUSION}
# All checkpoints, by short name.
RELEASED_BY_NAME = {
    released.name: released for released in (*GUIDED_DIFFUSION, *IMPROVED_DIFFUSION, *CONSISTENCY_MODELS, *COMMUNITY)
}

# Names of the table, without those that are registered.
TABLE_NAMES = frozenset(RELEASED_BY_NAME)

RELEASED_KINDS = ("unet", "upsampler", "classifier")


def register_released(released: ReleasedCheckpoint) -> None:
    """
    Registers a checkpoint in this process, so that it is found by name.

    Raises:
        ValueError: If the name or the file belongs to another checkpoint, or if the name, a flag, the kind or the classifier is not
            valid.
    """
    if RELEASED_BY_NAME.get(released.name) == released:
        return
    from diffusers_adm.checks import check_types  # imports torch, which the table does not need

    check_types(ReleasedCheckpoint, vars(released))
    # The cache has files of this name, so the name must not lead to another folder.
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", released.name):
        raise ValueError(
            f"`name` must be lower-case letters and digits, joined by single hyphens, but got {released.name!r}."
        )
    known = _rows_by_file(_plain)
    for name in (released.name, released.file, *released.aliases):
        if _plain(name) in known:
            raise ValueError(
                f"{name!r} is already a name of the released checkpoint {known[_plain(name)].name}. Choose another name."
            )
    if released.kind not in RELEASED_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(RELEASED_KINDS)}, but got {released.kind!r}.")
    if released.guided_by is not None and released.guided_by not in RELEASED_BY_NAME:
        raise ValueError(f"`guided_by` must be the name of a released checkpoint, but got {released.guided_by!r}.")
    parse_flags(released.flags)
    RELEASED_BY_NAME[released.name] = released


def _plain(name: str) -> str:
    return re.sub(r"[\s_/]+", "-", name.strip().lower().removesuffix(".pt").removesuffix(".pth"))


def _rows_by_file(key: Callable[[str], str]) -> dict[str, ReleasedCheckpoint]:
    """Returns all rows by a key of their file names. A short name is a file name too, and has priority."""
    rows = RELEASED_BY_NAME.values()
    known = {key(file): row for row in rows for file in (row.file, *row.aliases)}
    return known | {key(f"{row.name}.pt"): row for row in rows}


def released_checkpoint(name: str) -> ReleasedCheckpoint:
    """
    Returns a released checkpoint.

    Args:
        name: Short name or file name. Case does not matter, and `-` equals `_`.

    Raises:
        ValueError: If no checkpoint has this name. The message lists similar names.
    """
    known = _rows_by_file(_plain)
    if not isinstance(name, str):
        raise ValueError(
            f"`name` must be the name of a released checkpoint, such as 'imagenet-256', but got {name!r}."
        )
    if _plain(name) not in known:
        near = list(dict.fromkeys(known[match].name for match in difflib.get_close_matches(_plain(name), known, n=5)))
        advice = f" Similar names: {', '.join(near[:3])}." if near else ""
        raise ValueError(f"No released checkpoint is called {name!r}.{advice} `diffusers-adm released` lists all.")
    return known[_plain(name)]


def find_released(checkpoint: object) -> ReleasedCheckpoint | None:
    """
    Returns the released checkpoint whose file name or short name is the file name of a path. If several released files have the same
    name, the folder of the path must be the published one, as in `cifar10/ADM.pt`. Returns `None` for other paths and for state dicts.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        return None
    path, known = Path(checkpoint), _rows_by_file(str)
    return known.get("/".join(path.parts[-2:])) or known.get(path.name)


def check_layout(shapes: Mapping[str, tuple[int, ...]], released: ReleasedCheckpoint, source: str) -> None:
    """
    Checks that tensors have the names and shapes of a released checkpoint.

    Args:
        shapes: Shape of each tensor by name.
        released: Released checkpoint.
        source: File of the tensors.

    Raises:
        ValueError: If they are other tensors.
    """
    layout = tensor_layout(shapes)
    if released.layout not in (None, layout):
        like = [other.name for other in RELEASED_BY_NAME.values() if other.layout == layout]
        holds = (
            f"the tensors of {' or '.join(like[:3])}" if like else f"{layout.parameters:,} parameters of other tensors"
        )
        raise ValueError(
            f"{source} is not {released.name}, which has {released.layout.parameters:,} parameters: it holds {holds}."
        )


def guiding_classifier(unet: ReleasedCheckpoint) -> ReleasedCheckpoint | None:
    """Returns the classifier that guides the published samples of a UNet. Returns `None` if they are not guided."""
    return None if unet.guided_by is None else RELEASED_BY_NAME[unet.guided_by]


def imagenet_class_names() -> list[str]:
    """Returns the names of ImageNet's 1000 classes in the order of their labels. Some names occur twice."""
    from torchvision.models import ResNet18_Weights  # slow to import, and rarely needed

    return list(ResNet18_Weights.DEFAULT.meta["categories"])
