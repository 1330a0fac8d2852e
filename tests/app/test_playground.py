"""The playground in a real browser: what a visitor does, and what they see."""

import io
import os
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="needs Chromium: apt-get install chromium"
)
SECONDS = 1000


@pytest.fixture(scope="module")
def address() -> str:
    from tomesd.app.serve import serve

    return serve(block=False)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    assert CHROMIUM is not None, "CI needs Chromium"
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """The page with 3 steps, the first unmerged; `hosts` are all that it has asked for anything."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.set_default_timeout(60 * SECONDS)
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2].split(":")[0]))
    page.goto(address)
    page.get_by_text("Model, method, seed and steps").click()
    page.fill("#steps input", "3")
    return page


def wait(page, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(text, timeout=60 * SECONDS)


def draw(page, prompt: str, says: str = "Done.") -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    wait(page, "#status", says)


def source(page, name: str) -> str:
    return page.wait_for_selector(f"#{name} img").get_attribute("src")


def test_two_images_appear_and_differ_with_their_figures(page):
    draw(page, "a photo of a green star")
    assert source(page, "unpatched") != source(page, "merged")
    source(page, "difference")
    wait(page, "#figures", "dB")
    before = source(page, "merged")
    page.fill("#ratio input[type=number]", "0.25")
    draw(page, "a photo of a green star", "Drawing")
    wait(page, "#status", "Done.")
    page.wait_for_function(
        "before => document.querySelector('#merged img').src != before", arg=before
    )


def test_the_map_follows_its_sliders(page):
    wait(page, "#caption", "Step 3, down_blocks.0")
    page.fill("#map-block input[type=number]", "3")
    page.keyboard.press("Tab")
    wait(page, "#caption", "Step 3, up_blocks.2")
    page.fill("#map-step input[type=number]", "2")
    page.keyboard.press("Tab")
    wait(page, "#caption", "Step 2, up_blocks.2")


def test_wrong_input_is_a_sentence(page):
    draw(page, " ", "Type a prompt first.")
    page.fill("#model input", "./not/there")
    page.keyboard.press("Enter")
    draw(page, "a star", "a folder or a hub id, got './not/there'.")
    page.fill("#model input", "unet")
    page.keyboard.press("Enter")


def test_drawing_can_be_stopped(page):
    page.fill("#steps input", "200")
    draw(page, "a photo of a white moon", "Drawing")
    page.click("#stop")
    wait(page, "#status", "Stopped.")
    page.wait_for_selector("#draw:enabled")


def test_the_classifier_reads_an_upload_and_refuses_what_is_no_picture(page, tmp_path):
    page.get_by_role("tab", name="Classifier").click()
    wait(page, "#reading", "161 of 257 tokens")
    page.fill("#r input[type=number]", "16")
    page.keyboard.press("Tab")
    wait(page, "#reading", "65 of 257 tokens")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    seen = page.inner_text("#reading")
    page.set_input_files("#upload input[type=file]", tmp_path / "red.png")
    page.wait_for_function("seen => document.querySelector('#reading').innerText != seen", arg=seen)


def test_nothing_is_asked_of_another_machine(page):
    assert page.hosts == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        ("phone", 390, "dark"),
        pytest.param("playground", 1100, "light", marks=pytest.mark.slow),
        pytest.param("dark", 1100, "dark", marks=pytest.mark.slow),
    ],
)
def test_it_fits_the_screen_and_follows_the_theme(browser, address, name, width, theme):
    """`SCREENSHOTS=assets pytest -m slow tests/app -k playground-1100` makes the README's."""
    screen = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=theme)
    screen.goto(address)
    screen.wait_for_selector("#draw")
    assert screen.evaluate("document.documentElement.scrollWidth") <= width
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert (max(screen.evaluate(light)[:3]) < 64) == (theme == "dark")
    if name == "phone":
        return
    screen.click("#draw")
    wait(screen, "#caption", "512 groups")
    for image in ("unpatched", "merged", "difference", "map"):
        shown = screen.wait_for_selector(f"#{image} img").bounding_box()
        assert shown["height"] > 250, f"{image} is small"
    if folder := os.environ.get("SCREENSHOTS"):
        screen.evaluate("scrollTo(0, 0)")
        drawn = Image.open(io.BytesIO(screen.screenshot(full_page=True)))
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            f"{folder}/{name}.png", optimize=True
        )
