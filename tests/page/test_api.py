"""Clients of the page's API get the images of direct calls and messages for bad input, and do not affect each other."""

import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from documents import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from image_files import random_images
from PIL import Image

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.data.grids import grid_of
from diffusers_adm.examples.ddnm import shrink


pytestmark = pytest.mark.page


@pytest.fixture
def client(page_url) -> Client:
    return Client(page_url, verbose=False)


@pytest.fixture(scope="module")
def digit(tmp_path_factory, pipeline) -> Path:
    """A picture of a 3, eight times as large as the model's."""
    image = call(pipeline, DDIMScheduler, class_labels=[3], guidance_scale=1.0, generator=seeds(7))
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    image.resize((256, 256), Image.Resampling.NEAREST).save(path)
    return path


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def call(
    pipeline: ClassifierGuidedPipeline, scheduler: type[SchedulerMixin], steps: int = 25, **arguments
) -> Image.Image:
    """Returns the first image of a direct call."""
    own = ClassifierGuidedPipeline(**pipeline.components)
    own.scheduler = scheduler.from_config(pipeline.scheduler.config)
    own.set_progress_bar_config(disable=True)
    images = own(num_inference_steps=steps, **arguments).images
    return images[0] if len(images) == 1 else grid_of(images, columns=4)


def shown(path: str, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Returns the pixels of a picture that the page shows enlarged."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST))


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy())[None, None] / 127.5 - 1


def editor(path: str | Path) -> dict:
    """Returns the value of an editor that shows a picture."""
    return {"background": handle_file(path), "layers": [], "composite": None}


def compare(client: Client, seed: int, steps: int = 3) -> list[np.ndarray]:
    settings = [2.0, True, "DDIM", steps, 5.0, False, "DDPM", steps]
    *paths, status = client.predict("7", 3, seed, *settings, api_name="/compare")
    assert status.startswith("Done.")
    return [shown(path, (96, 32)) for path in paths]


def test_users_at_the_same_time_get_the_images_of_direct_calls(page_url, pipeline):
    drawn: dict[int, list[np.ndarray]] = {}

    def use(seed: int) -> None:
        drawn[seed] = compare(Client(page_url, verbose=False), seed)

    users = [threading.Thread(target=use, args=[seed]) for seed in (0, 100, 200, 200)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    for seed, (left, right) in drawn.items():
        labels = {"class_labels": [7] * 3}
        of_a = call(pipeline, DDIMScheduler, 3, guidance_scale=2.0, generator=seeds(*range(seed, seed + 3)), **labels)
        told = {"guidance_scale": 5.0, "condition_unet": False}
        of_b = call(pipeline, DDPMScheduler, 3, generator=seeds(*range(seed, seed + 3)), **told, **labels)
        assert (left == np.asarray(of_a)).all() and (right == np.asarray(of_b)).all()
    assert (drawn[0][0] != drawn[100][0]).any()


def test_a_picture_is_drawn_to_edit(client, pipeline):
    value = client.predict("5", 11, api_name="/draw")
    direct = call(pipeline, DDIMScheduler, class_labels=[5], guidance_scale=1.0, generator=seeds(11))
    assert (shown(value["background"]) == np.asarray(direct)).all()


def test_inversion_and_counterfactual_are_those_of_direct_calls(client, pipeline, digit):
    _, again, status = client.predict(editor(digit), "3", 20, api_name="/invert")
    changed, _ = client.predict(editor(digit), "3", "8", 2.0, 20, api_name="/counterfactual")
    x_0 = tensor(shown(digit))
    noise = pipeline.invert(x_0, [3], 20)
    direct = call(pipeline, DDIMScheduler, 20, class_labels=[3], guidance_scale=0.0, latents=noise)
    assert (shown(again) == np.asarray(direct)).all()
    direct = call(pipeline, DDIMScheduler, 20, class_labels=[8], guidance_scale=2.0, latents=noise)
    assert (shown(changed) == np.asarray(direct)).all()
    assert status.startswith("Step 20 of 20. Mean absolute error per pixel: ")
    assert float(status.split()[-1].removesuffix("%")) < 5


@pytest.mark.parametrize("part", ["Upper half", "What I paint"])
def test_inpainting_keeps_what_is_known_and_draws_the_rest(part, client, digit, tmp_path):
    with Image.open(digit) as picture:
        paint = Image.new("RGBA", picture.size)
        paint.paste("red", (0, 0, 256, 128))
    paint.save(tmp_path / "paint.png")
    painted = {"background": handle_file(digit), "layers": [handle_file(tmp_path / "paint.png")], "composite": None}
    drawn, _ = client.predict(editor(digit), part, painted, "8", 2.0, 20, 1, 0, api_name="/inpaint")
    before, after = shown(digit), shown(drawn)
    assert (before[16:] == after[16:]).all() and (before[:16] != after[:16]).any()


def test_enlarged_picture_agrees_with_the_small_one(client, digit):
    small, drawn, _ = client.predict(editor(digit), 4, "3", 20, 0, api_name="/super_resolve")
    x_0 = tensor(shown(digit))
    assert (shrink(tensor(shown(small))) - shrink(x_0)).abs().max() < 0.01
    assert (shrink(tensor(shown(drawn))) - shrink(x_0)).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3", 0, 0), "less than minimum value 1"),
        (("3", 100, 0), "greater than maximum value 16"),
        (("cat", 1, 0), "cat"),
        (("3", 1, -1), "less than minimum value 0"),
        (("3", 1, None), "First seed is empty. Enter a whole number."),
    ],
)
def test_values_outside_the_controls_are_refused(arguments, message, client):
    settings = [2.0, True, "DDIM", 2] * 2
    with pytest.raises(AppError, match=message) as caught:
        client.predict(*arguments, *settings, api_name="/compare")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_run_refuses_is_told_in_its_words(client, digit):
    with pytest.raises(AppError, match="A guidance scale other than 0 needs a class"):
        client.predict(editor(digit), "Lower half", None, "No class", 1.0, 20, 1, 0, api_name="/inpaint")
    with pytest.raises(AppError, match="First paint over the part"):
        client.predict(editor(digit), "What I paint", editor(digit), "3", 1.0, 20, 1, 0, api_name="/inpaint")
    with pytest.raises(AppError, match="Draw or upload a picture first"):
        client.predict({"background": None, "layers": [], "composite": None}, "3", 20, api_name="/invert")


def enormous_png(path: Path) -> None:
    """Writes a small file that claims to hold a picture of 1.6 gigapixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def large_png(path: Path) -> None:
    """Writes a sound picture of 36 megapixels."""
    Image.new("1", (6000, 6000)).save(path)


def damaged_png(path: Path) -> None:
    Image.fromarray(random_images(1)[0, ..., 0]).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def postscript(path: Path) -> None:
    """Writes a picture in a format that Pillow hands over to another program."""
    Image.new("L", (8, 8)).save(path, format="EPS")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (enormous_png, "too large: at most 16 million pixels"),
        (large_png, "too large: at most 16 million pixels"),
        (damaged_png, "must be a picture that can be read"),
        (postscript, "must be a picture that can be read"),
        (
            lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
            "must be a picture that can be read",
        ),
        (lambda path: path.write_bytes(bytes(6 * 10**6)), "exceed"),
    ],
)
def test_uploads_that_are_no_pictures_or_too_large_are_refused(
    write: Callable[[Path], object], message, client, tmp_path
):
    write(tmp_path / "upload.png")
    with pytest.raises(Exception, match=message) as caught:
        client.predict(editor(tmp_path / "upload.png"), "3", 2, api_name="/invert")
    assert "Traceback" not in str(caught.value)


def test_requests_are_bounded(page_url):
    request = urllib.request.Request(f"{page_url}/gradio_api/queue/join", data=bytes(8 * 10**6), method="POST")
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert getattr(caught.value, "code", 413) == 413


def test_cancelled_runs_make_room_for_others(client):
    long = ["3", 16, 0, *[1.0, True, "DDPM", 250] * 2]
    jobs = [client.submit(*long, api_name="/compare") for _ in range(2)]  # as many as run at the same time
    while not all(job.outputs() for job in jobs):
        time.sleep(0.05)
    for job in jobs:
        assert job.cancel()
    started = time.monotonic()
    compare(client, seed=0)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("path", ["/etc/hostname", ROOT / "setup.py", "setup.py", "../setup.py", Path(__file__)])
def test_only_files_of_the_page_are_served(path, page_url):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{page_url}/gradio_api/file={path}", timeout=30)
    assert caught.value.code in (403, 404)
