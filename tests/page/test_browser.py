"""The page in a browser: every tab is used as a person would, on a wide screen, on a phone, and by keyboard."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from documents import ROOT
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.data.grids import grid_of, labelled_grid


pytestmark = [pytest.mark.page, pytest.mark.browser]

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TABS = ("Play", "Trade-off", "Path", "Edit", "Compare", "About")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SCREENSHOTS = ROOT / "build" / "page"
TIMEOUT = 120_000  # ms, because a run may wait for two others
# Roles of the controls that a screen reader reads by their names.
CONTROLS = {"button", "checkbox", "combobox", "link", "radio", "slider", "spinbutton", "tab", "textbox", "searchbox"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not installed.")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture
def page(browser, page_url) -> Iterator[Page]:
    """The page, opened anew. Afterwards it must have asked for nothing elsewhere, and no script of it may have failed."""
    page, hosts, failures = browser.new_page(viewport=DESK), set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    page.goto(page_url)
    yield page
    page.close()
    assert hosts - {""} == {urlsplit(page_url).netloc}  # blob: and data: have no host
    assert not failures


def open_tab(page: Page, name: str) -> Locator:
    """Opens a tab, and returns what it holds."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True).first


def press(panel: Locator, name: str, done: str | re.Pattern = "Done.") -> None:
    """Presses a button, and waits until the status says that its run is done."""
    panel.get_by_role("button", name=name, exact=True).click()
    expect(panel.locator(".prose.status").filter(visible=True)).to_contain_text(done)


def pixels(panel: Locator, label: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels of an output, as the model drew them."""
    frame = panel.locator(".block").filter(has=panel.page.get_by_text(label, exact=True)).filter(visible=True).last
    return fetched(frame.locator("img").first, size)


def fetched(image: Locator, size: tuple[int, int]) -> np.ndarray:
    content = image.page.request.get(image.get_attribute("src")).body()
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.NEAREST))


def draw(pipeline: ClassifierGuidedPipeline, seeds: range, steps: int, **call) -> list[Image.Image]:
    """Returns the images of a direct call with DDIM."""
    own = ClassifierGuidedPipeline(**pipeline.components)
    own.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    own.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return own(num_inference_steps=steps, generator=generator, **call).images


def rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def save_screenshot(page: Page, name: str) -> None:
    """Takes a screenshot of the whole page, for a person to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_play_fills_a_gallery_with_the_images_of_a_call(page, pipeline):
    panel = open_tab(page, "Play")
    press(panel, "Draw")
    images = panel.locator(".grid-wrap img")
    expect(images).to_have_count(20)
    call = {"class_labels": [digit for digit in range(10) for _ in range(2)], "guidance_scale": 2.0}
    for image, drawn in zip(images.all(), draw(pipeline, range(20), 10, **call), strict=True):
        assert (fetched(image, (32, 32)) == rgb(drawn)).all()
    code = panel.get_by_role("textbox", name="Code input container")
    expect(code).to_contain_text("ClassifierGuidedPipeline")
    save_screenshot(page, "play")


def test_trade_off_draws_the_same_noise_at_each_scale(page, pipeline):
    panel = open_tab(page, "Trade-off")
    press(panel, "Draw")
    scales, rows = (0, 1, 2, 5, 10), range(5)
    call = {"class_labels": [3] * 25, "guidance_scale": [scale for scale in scales for _ in rows]}
    generators = [seed for _ in scales for seed in rows]
    images = draw(pipeline, generators, 10, condition_unet=False, **call)
    grid = labelled_grid([f"seed {row}" for row in rows], list(map(str, scales)), [images[row::5] for row in rows])
    assert (pixels(panel, "The same noise in each row", grid.size) == rgb(grid)).all()
    expect(panel.locator("svg.chart, .chart svg")).to_have_count(2)
    save_screenshot(page, "trade_off")


def test_path_is_that_of_a_call(page, pipeline):
    panel = open_tab(page, "Path")
    press(panel, "Draw", "Step 25 of 25")
    call = {"class_labels": [3], "guidance_scale": 5.0, "condition_unet": False}
    (image,) = draw(pipeline, range(1), 25, **call)
    difference = pixels(panel, "Predicted x_0", (32, 32)).astype(int) - rgb(image)
    assert abs(difference).max() <= 1  # the predicted x_0 of the last step is the image, but for rounding
    panel.get_by_role("slider", name="Step to look at").press("Home")
    expect(panel.locator(".prose.status").filter(visible=True)).to_contain_text("Step 1 of 25")
    save_screenshot(page, "path")


def test_drawn_picture_is_edited_in_every_way(page):
    panel = open_tab(page, "Edit")
    draw_three(panel, 0)
    press(panel, "Invert", "Mean absolute error")
    save_screenshot(page, "edit_inversion")
    for tab, button, done in (
        ("Counterfactual", "Change the class", "Step 50 of 50"),
        ("Inpainting", "Inpaint", re.compile(r"Step (\d+) of \1\b")),
        ("Super-resolution", "Enlarge", "Step 50 of 50"),
    ):
        page.get_by_role("tab", name=tab, exact=True).click()
        press(panel, button, done)
        save_screenshot(page, f"edit_{tab.lower()}")
    drawn = pixels(panel, "Shrunk", (32, 32))
    assert drawn.max() > 128  # the drawing was used


def test_interval_is_dragged_and_the_path_is_drawn_anew(page):
    page.set_viewport_size({"width": 1280, "height": 1700})
    panel = open_tab(page, "Path")
    status = panel.locator(".status").first
    panel.get_by_role("spinbutton", name="Steps").fill("10")
    panel.get_by_role("button", name="Draw", exact=True).click()
    expect(status).to_contain_text("Step 10 of 10, noise level 0.01")
    expect(status).to_contain_text(", guided.")
    plot = panel.locator("svg .plot").bounding_box()
    places = [plot["x"] + part * plot["width"] for part in (0.6, 0.5, 0.2)]
    y = plot["y"] + plot["height"] / 2
    page.mouse.move(places[0], y)
    page.mouse.down()
    page.mouse.move(places[1], y)
    page.mouse.move(places[2], y)
    page.mouse.up()
    expect(panel.get_by_role("spinbutton", name="Guidance begins")).to_have_value("20")
    expect(panel.get_by_role("spinbutton", name="Guidance ends")).to_have_value("60")
    expect(status).to_contain_text(", not guided.")
    expect(status).to_contain_text("Step 10 of 10")


def draw_three(panel: Locator, number: int) -> None:
    """Draws a 3 with the mouse in one of the visible editors, when the editor is ready for strokes."""
    canvas, mouse = panel.locator("canvas").filter(visible=True).nth(number), panel.page.mouse
    empty = canvas.screenshot()
    while canvas.screenshot() == empty:
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse.move(x - 50, y - 70)
        mouse.down()
        for dx, dy in ((0, -90), (50, -60), (10, -5), (55, 40), (10, 85), (-50, 65)):
            mouse.move(x + dx, y + dy, steps=8)
        mouse.up()
        mouse.move(0, 0)  # the brush under the pointer is no stroke
        panel.page.wait_for_timeout(1000)


def test_uploaded_picture_is_made_a_counterfactual(page, pipeline, tmp_path):
    (image,) = draw(pipeline, range(5, 6), 25, class_labels=[3], guidance_scale=1.0)
    image.resize((256, 256), Image.Resampling.NEAREST).save(tmp_path / "digit.png")
    panel = open_tab(page, "Edit")
    with page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name="Clear canvas").first.click()
        panel.get_by_role("button", name="Upload", exact=True).first.click()
    chooser.value.set_files(tmp_path / "digit.png")
    page.get_by_role("tab", name="Counterfactual").click()
    press(panel, "Change the class", "Step 50 of 50")
    x_0 = torch.from_numpy(np.array(image))[None, None] / 127.5 - 1
    noise = pipeline.invert(x_0, [3], 50)
    (changed,) = draw(pipeline, range(1), 50, class_labels=[8], guidance_scale=2.0, latents=noise)
    assert (pixels(panel, "Counterfactual", (32, 32)) == rgb(changed)).all()


def test_painted_part_is_drawn_anew(page):
    panel = open_tab(page, "Edit")
    panel.get_by_role("button", name="Draw one").click()
    page.get_by_role("tab", name="Inpainting").click()
    panel.get_by_label("What I paint").check()
    press_and_read_error(page, panel, "Inpaint", "First paint over the part")
    expect(panel.get_by_role("button", name="Undo").filter(visible=True).last).to_be_enabled()  # the picture is there
    draw_three(panel, -1)
    press(panel, "Inpaint", re.compile(r"Step (\d+) of \1\b"))
    save_screenshot(page, "edit_painted")


def press_and_read_error(page: Page, panel: Locator, button: str, message: str) -> None:
    """Presses a button, and waits for a message in the page."""
    panel.get_by_role("button", name=button, exact=True).click()
    expect(page.get_by_text(message)).to_be_visible()
    assert "Traceback" not in page.content()
    page.get_by_role("button", name="Close").first.click()


def test_compare_draws_both_sides_from_the_same_seeds(page, pipeline):
    panel = open_tab(page, "Compare")
    press(panel, "Compare")
    for name, scale in (("A", 0.0), ("B", 3.0)):
        grid = grid_of(draw(pipeline, range(8), 25, class_labels=[3] * 8, guidance_scale=scale), columns=4)
        assert (pixels(panel, f"Images of {name}", grid.size) == rgb(grid)).all()
    save_screenshot(page, "compare")


def test_stopped_run_makes_room_for_the_next(page):
    panel = open_tab(page, "Compare")
    for side in "AB":
        panel.get_by_role("spinbutton", name=f"Steps of {side}").fill("250")
    panel.get_by_role("button", name="Compare", exact=True).click()
    status = panel.locator(".prose.status").filter(visible=True)
    expect(status).to_contain_text(re.compile(r"A: step \d+ of 250"))
    panel.get_by_role("button", name="Stop").click()
    expect(status).to_have_text("Stopped.")
    page.wait_for_timeout(1000)  # a run that is stopped ends after its step; a person takes longer than that
    for side in "AB":
        panel.get_by_role("spinbutton", name=f"Steps of {side}").fill("2")
    press(panel, "Compare")


@pytest.mark.parametrize("name", TABS)
def test_every_control_has_a_name_and_fits_a_phone(name, page):
    open_tab(page, name)
    session = page.context.new_cdp_session(page)
    for tab in ["", "Counterfactual", "Inpainting", "Super-resolution"] if name == "Edit" else [""]:
        if tab:
            page.get_by_role("tab", name=tab, exact=True).click()
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
        unnamed = [node for node in controls if not node.get("name", {}).get("value", "").strip()]
        assert controls and not unnamed
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    save_screenshot(page, f"phone_{name.lower()}")


def test_keyboard_alone_draws(page):
    focused = page.locator("*:focus")
    reached = []

    def go_to(role: str, name: str) -> None:
        for _ in range(100):
            page.keyboard.press("Tab")
            if page.get_by_role(role, name=name).filter(visible=True).and_(focused).count():
                return
            reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 80)"))
        pytest.fail(f"The tab key does not reach {role} {name}: {reached}", pytrace=False)

    page.get_by_role("tab", name="Play").focus()
    page.keyboard.press("Enter")
    go_to("slider", "Images per class")
    page.keyboard.press("Home")
    go_to("slider", "Steps")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    go_to("button", "Draw")
    page.keyboard.press("Enter")
    panel = page.get_by_role("tabpanel").filter(visible=True).first
    expect(panel.locator(".prose.status")).to_contain_text("Done.")
    expect(panel.locator(".grid-wrap img")).to_have_count(10)
