"""Small checkpoints in the table of released ones, and processes that ask for them."""

import io
import multiprocessing
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from file_server import FileServer
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.hub import released_files, resumed_download
from diffusers_adm.openai.released import RELEASED_BY_NAME, register_released
from diffusers_adm.openai.released_rows import ReleasedCheckpoint, tensor_layout


CHUNK_BYTES = 1000  # of downloads, so that a small file has many


def file_of(case: str, **others: object) -> bytes:
    """The published file of a small model."""
    buffer = io.BytesIO()
    torch.save({**draw_weights(load_case(case)[0]), **others}, buffer)
    return buffer.getvalue()


UNET, CLASSIFIER = file_of("unet_class_conditional"), file_of("classifier_attention")


def add(name: str, server: FileServer, case="unet_class_conditional", served="unet.pt", kind="unet", **columns):
    """Adds a small model, whose file the server has, to the table."""
    description = load_case(case)[0]
    shapes = {name: tuple(shape) for name, shape in description["parameters"]}
    known = {
        "file": f"{name}.pt",
        "flags": published_flags(description),
        "trained_on": "noise",
        "layout": tensor_layout(shapes),
        "address": f"{server.url}/{served}",
    }
    register_released(ReleasedCheckpoint(kind=kind, name=name, **{**known, **columns}))


def place_of(cache: Path, name: str = "tiny") -> Path:
    """The file of a small model in a cache, whose folder is made."""
    file = released_files.cached_file(RELEASED_BY_NAME[name], cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


class Halting(ClassifierGuidedPipeline):
    """Pipeline whose saving never ends."""

    def save_pretrained(self, folder, **options) -> None:
        """Saves the weights, and waits to be killed."""
        self.unet.save_pretrained(Path(folder) / "unet")
        time.sleep(600)


def ask(rows: list[ReleasedCheckpoint], cache: Path, pipeline_class: type) -> None:
    """Requests the folder of the last row in a new process."""
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    resumed_download.CHUNK_BYTES = CHUNK_BYTES
    for row in rows:
        register_released(row)
    released_files.converted_folder(rows[-1], pipeline_class.from_openai, cache_dir=cache)


def process_that_asks(cache: Path, pipeline_class: type = ClassifierGuidedPipeline):
    """Starts a process that downloads and converts `tiny`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_adm.pipelines.released"])  # imports torch once for all processes
    rows = [RELEASED_BY_NAME[row] for row in ("tiny-classifier", "tiny")]
    process = context.Process(target=ask, args=(rows, cache, pipeline_class))
    process.start()
    return process


def files_in(folder: Path) -> set[str]:
    """Names of the files of a cache, without its locks."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def check_refused(message: str, cache: Path, name: str = "tiny", error: type = ValueError, **options) -> None:
    """Checks that loading fails with one line, and leaves no file and no folder in the cache."""
    with pytest.raises(error, match=message) as caught:
        ClassifierGuidedPipeline.from_released(name, cache_dir=cache, **options)
    assert "\n" not in str(caught.value)
    assert not files_in(cache)
