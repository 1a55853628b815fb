"""The tabs Play, Trade-off and Path draw what direct calls draw."""

import gradio as gr
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from tiny_models import tiny_scheduler, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.page import play as play_module
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.page import build_page
from diffusers_adm.page.path import follow, gradient_picture
from diffusers_adm.page.play import MAX_IMAGES, play
from diffusers_adm.page.tradeoff import judged_share, mean_distance, scale_charts, trade_off


pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def model() -> PageModel:
    return PageModel(load_pipeline(None))


@pytest.fixture(scope="module")
def unguided(tmp_path_factory) -> PageModel:
    """A saved model without classes and without a classifier."""
    folder = str(tmp_path_factory.mktemp("model"))
    ClassifierGuidedPipeline(tiny_unet(num_class_embeds=None), tiny_scheduler()).save_pretrained(folder)
    loading = {"model": folder, "revision": None, "dtype": "bfloat16"}
    return PageModel(load_pipeline(**loading), **loading)


def draw(model: PageModel, scheduler: str, seeds: range, **call):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return model.pipeline(scheduler)(generator=generators, **call).images


def same(first: Image.Image, second: Image.Image) -> bool:
    return (first.mode, first.size, first.tobytes()) == (second.mode, second.size, second.tobytes())


# --- Play ---


@pytest.mark.parametrize("solver", ["DDIM", "DPMSolverMultistep"])
def test_gallery_fills_and_its_code_draws_the_same_images(model, solver, monkeypatch):
    monkeypatch.setattr(play_module, "SECONDS_BETWEEN_PICTURES", 0.0)
    shown = list(play(model, ["3", "8"], 2, 1.5, 4, solver, 7, False))
    assert [status for _, status, _ in shown] == ["Step 1 of 4", "Step 2 of 4", "Step 3 of 4", "Done."]
    pictures, _, code = shown[-1]
    assert [name for _, name in pictures] == ["3", "3", "8", "8"]
    names = {}
    exec(code, names)
    assert all(same(picture, image) for (picture, _), image in zip(pictures, names["images"], strict=True))


def test_few_pictures_are_sent_of_many_quick_steps(model, monkeypatch):
    monkeypatch.setattr(play_module, "SECONDS_BETWEEN_PICTURES", 600.0)
    assert [status for _, status, _ in play(model, ["3"], 1, 1.0, 4, "DDIM", 0, True)] == ["Done."]


def test_code_loads_the_model_of_the_page(unguided):
    *_, (pictures, _, code) = play(unguided, [], 3, 0.0, 2, "DDPM", 0, True)
    names = {}
    exec(code, names)
    assert len(pictures) == 3
    assert all(same(picture, image) for (picture, _), image in zip(pictures, names["images"], strict=True))


@pytest.mark.parametrize(("names", "count", "message"), [([], 1, "at least one class"), (["3"] * 9, 9, "81 were")])
def test_no_class_and_too_many_images_are_refused(model, names, count, message):
    with pytest.raises(ValueError, match=message):
        next(play(model, names, count, 1.0, 2, "DDIM", 0, True))
    assert MAX_IMAGES < 81


# --- Trade-off ---


def test_charts_tell_of_the_images_of_each_scale(model):
    *_, (grid, status, *charts) = trade_off(model, 3, 3, 5, [10.0, 0.0], "DDIM", 4, False)
    call = {"class_labels": [3] * 3, "num_inference_steps": 4, "condition_unet": False, "output_type": "latent"}
    columns = [draw(model, "DDIM", range(5, 8), guidance_scale=scale, **call) for scale in (0.0, 10.0)]
    right = [judged_share(model.pipeline().classifier, column, 3) for column in columns]
    assert right[0] < right[1] == 1.0
    distances = [mean_distance(column) for column in columns]
    assert distances[0] > distances[1]
    assert tuple(charts) == scale_charts([0.0, 10.0], right, distances) and status == "Done."


def test_distance_is_the_root_mean_square_of_the_difference():
    images = torch.zeros(3, 1, 2, 2)
    images[1] = 1.0
    images[2, 0, 0, 0] = 5.0  # shown as 1
    assert mean_distance(images) == pytest.approx((1.0 + 0.5 + 0.75**0.5) / 3)


def test_one_scale_is_no_trade_off(model):
    with pytest.raises(ValueError, match="two guidance scales"):
        next(trade_off(model, 3, 2, 0, [1.0], "DDIM", 2, True))


# --- Path ---


def test_path_shows_the_steps_of_a_run(model):
    *_, path = follow(model, 3, 0, "DDIM", 5.0, 10, False, (0.2, 0.6))
    assert path.guided == [2 <= step < 6 for step in range(10)]
    call = {"class_labels": [3], "guidance_scale": 5.0, "num_inference_steps": 10, "condition_unet": False}
    call |= {"guidance_options": {"step_fractions": (0.2, 0.6)}, "generator": torch.Generator().manual_seed(0)}
    pipeline = model.pipeline("DDIM")
    steps = list(pipeline.steps(**call))
    for index, step in enumerate(steps):
        x_t, x_0, gradient = path.pictures[index]
        assert same(x_t, pipeline.image_processor.postprocess(step.x_t)[0]) and same(x_0, step.x_0_images[0])
        assert same(gradient, gradient_picture(step.gradient, x_t.size))
        belief = step.log_probabilities[0].exp()
        torch.testing.assert_close(torch.tensor(path.beliefs[index]), belief)
    noise = f"noise level {steps[3].sigma:.3g}, p(3 | x_t) = {path.beliefs[3][3]:.3f}"
    assert path.words(3) == f"Step 4 of 10, {noise}, guided." and path.words(7).endswith(", not guided.")
    *pictures, chart, words = path.view(3)
    assert [picture.size for picture in pictures] == [(256, 256)] * 3 and words == path.words(3)
    assert chart.count("<title>") == 10 and chart != path.chart(4)


def test_path_of_a_model_that_is_not_guided_has_no_beliefs(unguided):
    *_, path = follow(unguided, None, 0, "DDIM", 0.0, 3, True, (0.0, 1.0))
    assert len(path.pictures) == 3 and path.chart(0) == ""
    assert path.words(0).endswith(", not guided.")


def test_gradient_is_red_where_it_brightens_and_blue_where_it_darkens():
    gradient = torch.tensor([[[[2.0, -2.0], [1.0, 0.0]]]])
    picture = gradient_picture(gradient, (2, 2))
    pixels = [picture.getpixel((x, y)) for y in range(2) for x in range(2)]
    assert pixels == [(255, 0, 0), (0, 0, 255), (255, 128, 128), (255, 255, 255)]
    assert gradient_picture(None, (2, 2)).getpixel((0, 0)) == (204, 204, 204)
    assert gradient_picture(torch.zeros(1, 3, 2, 2), (2, 2)).getpixel((0, 0)) == (255, 255, 255)


def test_interval_that_ends_before_it_begins_is_refused(model):
    with pytest.raises(ValueError, match="must begin before it ends, but got 60% and 40%"):
        next(follow(model, 3, 0, "DDIM", 5.0, 10, False, (0.6, 0.4)))


def test_pages_of_all_models_can_be_built(model, unguided):
    for one in (model, unguided):
        assert isinstance(build_page(one), gr.Blocks)


# --- API ---


def test_clients_are_given_what_the_page_shows(page_url, model):
    client = Client(page_url, verbose=False)
    gallery, status, code = client.predict(["3", "8"], 1, 2.0, 3, "DDIM", 4, True, api_name="/play")
    call = {"class_labels": [3, 8], "guidance_scale": 2.0, "num_inference_steps": 3}
    for shown, image in zip(gallery, draw(model, "DDIM", range(4, 6), **call), strict=True):
        with Image.open(shown["image"]) as picture:
            assert same(picture.convert("L"), image)
    assert status == "Done." and "range(4, 6)" in code
    _, status, share, diversity = client.predict("3", 2, 0, [0, 5], "DDIM", 2, False, api_name="/trade_off")
    assert status == "Done." and "<svg" in share and "<svg" in diversity
    *pictures, chart, status, _ = client.predict("3", 0, "DDIM", 5.0, 4, False, 25, 75, api_name="/path")
    assert len(pictures) == 3 and "<svg" in chart and status.startswith("Step 4 of 4, noise level 0.01, p(3 | x_t) = ")


def test_clients_are_told_what_is_refused(page_url):
    client = Client(page_url, verbose=False)
    with pytest.raises(AppError, match="Choose at least one class."):
        client.predict([], 1, 2.0, 3, "DDIM", 4, True, api_name="/play")
    with pytest.raises(AppError, match="Guidance must begin before it ends"):
        client.predict("3", 0, "DDIM", 5.0, 4, False, 75, 25, api_name="/path")
