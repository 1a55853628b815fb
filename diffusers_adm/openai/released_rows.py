"""Rows of the table of released checkpoints."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from diffusers_adm.openai.flags import parse_flags


DOWNLOAD_FOLDER = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"


class TensorLayout(NamedTuple):
    """
    Summary of the names and shapes of all tensors of a checkpoint.

    Args:
        digest: First 16 digits of the SHA-256 of the sorted names and shapes.
        parameters: Total number of elements of all tensors.
    """

    digest: str
    parameters: int


def tensor_layout(shapes: Mapping[str, tuple[int, ...]]) -> TensorLayout:
    """
    Returns a summary of the names and shapes of tensors.

    Args:
        shapes: Shape of each tensor by its name in the original code.
    """
    lines = (f"{name} {','.join(map(str, shape))}" for name, shape in sorted(shapes.items()))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return TensorLayout(digest, sum(math.prod(shape) for shape in shapes.values()))


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """
    Released checkpoint.

    Args:
        file: Name of the file. If several released files have the same name, it begins with a folder.
        kind: Kind of the model: "unet", "upsampler" or "classifier".
        flags: Model flags of the original command line. Missing flags have the defaults of guided-diffusion.
        imagenet_labels: Whether the labels are the 1000 classes of ImageNet.
        guidance_scale: Published scale of classifier guidance for sampling. `None` for a model that is not guided.
        timestep_respacing: Respacing that is recommended for sampling. `None` means 250 steps.
        fid: Published FID of 50 000 samples, which the model must reproduce. `None` if it is not published.
        fid_setting: Steps and guidance of those samples.
        name: Short name, in lower case with hyphens.
        trained_on: Images that the model was trained on.
        guided_by: Name of the classifier that guides the published samples. `None` for a model that is not guided.
        layout: Names and shapes of the tensors. A file is checked against them. `None` if they are not known.
        address: Address of the file. `None` for a file of `DOWNLOAD_FOLDER`.
        sha256: SHA-256 of the file. `None` if it is not published.
        license: License of the weights. It ends with "(code)" if only the code that trained the weights has a license.
        terms: Restriction of the license, which must be accepted before the file is downloaded. `None` if there is none.
        for_research: Whether the model card in the repository of `code` allows research only, and excludes commercial deployment.
        code: Repository whose code trained the model.
        note: Purpose of the checkpoint, or a special feature of it.
        aliases: Other names of the file.
        unsupported: Reason why the checkpoint cannot be converted. `None` if it can.
    """

    file: str
    kind: str
    flags: str
    imagenet_labels: bool = False
    guidance_scale: float | None = None
    timestep_respacing: str | None = None
    fid: float | None = None
    fid_setting: str | None = None
    _: KW_ONLY
    name: str
    trained_on: str
    guided_by: str | None = None
    layout: TensorLayout | None = None
    address: str | None = None
    sha256: str | None = None
    license: str = "not stated"
    terms: str | None = None
    for_research: bool = False
    code: str = "openai/guided-diffusion"
    note: str = ""
    aliases: tuple[str, ...] = ()
    unsupported: str | None = None

    @property
    def url(self) -> str:
        """Address of the file."""
        return DOWNLOAD_FOLDER + self.file if self.address is None else self.address

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        return parse_flags(self.flags)["large_size" if self.kind == "upsampler" else "image_size"]

    @property
    def license_terms(self) -> str:
        """License with its restriction."""
        terms = self.terms or ("research only" if self.for_research else None)
        return self.license if terms is None else f"{self.license}, {terms}"

    @property
    def size(self) -> int | None:
        """Approximate number of bytes of the file, whose weights are float32. `None` if it is not known."""
        return None if self.layout is None else 4 * self.layout.parameters
