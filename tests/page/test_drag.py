"""The interval of guidance can be dragged across the chart of the tab Path."""

from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright


CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.page,
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is not installed."),
]
expect.set_options(timeout=120_000)  # ms


def test_interval_is_dragged_and_the_path_is_drawn_anew(page_url):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1700})
        page.goto(page_url)
        page.get_by_role("tab", name="Path").click()
        panel = page.get_by_role("tabpanel").filter(visible=True).first
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
        browser.close()
