"""The site's own search answers what people ask about the known plugin, in a real browser."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest

pytest.importorskip("material")
playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ,
        reason="needs Chromium: apt-get install chromium",
    ),
]

# Titles of issues of dbolya/tomesd, and where the answer is.
QUESTIONS = {
    "no speed up": "troubleshooting/#no-speedup",
    "No speed up for stable-diffusion-x4-upscaler": "troubleshooting/#upscaler",
    "Cannot reproduce the results of speedup": "troubleshooting/#no-speedup",
    "SDXL": "troubleshooting/#sdxl",
    "ControlNet Support": "troubleshooting/#controlnet",
}
# The links of the first three pages that are found.
LINKS = """[...document.querySelectorAll('.md-search-result__item')].slice(0, 3).flatMap(
    item => [...item.querySelectorAll('a')].map(link => link.href))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", site],
        cwd=ROOT,
        check=True,
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_questions_find_the_page_that_answers_them(address):
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for question, answer in QUESTIONS.items():
            page = browser.new_page()
            page.goto(f"{address}?q={quote(question)}")
            page.wait_for_selector(".md-search-result__item a", state="attached", timeout=120_000)
            found = [re.sub(r"\?[^#]*", "", link) for link in page.evaluate(LINKS)]
            assert address + answer in found, f"{question}: {found}"
            page.close()
        browser.close()
