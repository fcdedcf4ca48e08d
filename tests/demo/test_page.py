"""The page in a real browser, and what its server answers. Needs Gradio; the browser tests also Playwright and Chromium
(`pip install playwright`, `apt-get install chromium`).
"""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.support.decompression import png
from uvim_fsq.demo.prediction import cell_side
from uvim_fsq.demo.server import address_of, listen, make_server, open_demo, prepared

pytest.importorskip("gradio", reason="Gradio is not installed (extra demo)")
pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
#: Milliseconds to wait for a change on the page; much more than a machine needs that does nothing else.
PATIENCE = 240_000


@pytest.fixture(scope="module")
def address(random_runs: tuple[Path, Path]) -> Iterator[str]:
    """A server of the page of an untrained LM with its data set."""
    with prepared():
        from uvim_fsq.demo.page import build_page

        listening = listen("127.0.0.1", 0)
        server = make_server(build_page(*open_demo(str(random_runs[1]))), "127.0.0.1")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield address_of(listening)
        server.should_exit = True
        thread.join()
        listening.close()


def test_an_oracle_and_a_direct_model_have_their_part_of_the_page(
    random_runs: tuple[Path, Path], direct_dir: Path
) -> None:
    with prepared():
        from uvim_fsq.demo.page import build_page

        for run, there, missing in ((random_runs[0], "tokens_a", "photo"), (direct_dir, "photo", "tokens_a")):
            config = build_page(*open_demo(str(run))).get_config_file()
            names = [component["props"].get("elem_id") for component in config["components"]]
            assert there in names and missing not in names and "codes" not in names


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and content."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_of_the_machine_is_served(address: str, random_runs: tuple[Path, Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"confidential")
    for path in (
        secret,
        "/etc/passwd",
        "//etc/passwd",
        random_runs[1] / "config.yaml",
        Path("pyproject.toml").resolve(),
    ):
        status, content = fetch(f"{address}/gradio_api/file={path}")
        assert status in (403, 404) and b"confidential" not in content, path
    assert fetch(f"{address}/gradio_api/file=https://example.com/a.png")[0] == 404


@pytest.mark.parametrize("source", ["file", "address"])
def test_only_uploads_are_predicted(address: str, tmp_path: Path, source: str) -> None:
    local = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(local)
    path = str(local) if source == "file" else f"{address}/static/img/logo.svg"
    config = json.loads(fetch(f"{address}/config")[1])
    (call,) = [d for d in config["dependencies"] if len(d["inputs"]) == 5]
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "hard", 0, 1, 0]
    session = uuid.uuid4().hex[:10]
    body = json.dumps({"data": data, "fn_index": call["id"], "session_hash": session}).encode()
    assert fetch(f"{address}/gradio_api/queue/join", body, **{"Content-Type": "application/json"})[0] == 200
    said = fetch(f"{address}/gradio_api/queue/data?session_hash={session}")[1].decode()
    assert '"success":false' in said.replace(" ", "") and "image.png" not in said
    assert ("it was not uploaded by a user" if source == "file" else "only uploaded files are read") in said


class Browser:
    """A page in Chromium, and the addresses that it asked for.

    Attributes:
        page: Playwright's page.
        asked: all addresses.
        problems: errors that the browser logged.
    """

    def __init__(self, page: Any) -> None:
        self.page, self.asked, self.problems = page, [], []
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def drop(self, content: bytes, name: str = "photo.png") -> None:
        """Gives the page a photo."""
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.set_input_files("#photo input[type=file]", file)

    def picture(self, name: str, other_than: str = "") -> str:
        """Waits for a picture, of another address than the one given. Returns its address."""
        script = "([id, old]) => { const i = document.querySelector(`#${id} img`); return i && i.complete && "
        script += "i.naturalWidth > 0 && i.src != old ? i.src : null }"
        return self.page.wait_for_function(script, arg=[name, other_than]).json_value()

    def pixels(self, address: str) -> np.ndarray:
        """A picture's pixels."""
        return np.asarray(Image.open(io.BytesIO(fetch(address)[1])).convert("RGB"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Callable[[], Any]]:
    """Opens new pages, each of a new visitor."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield lambda: browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        browser.close()


@pytest.fixture
def browser(chromium: Callable[[], Any], address: str) -> Iterator[Browser]:
    found = Browser(chromium())
    found.page.goto(address)
    found.page.wait_for_selector("#photo input[type=file]", state="attached")
    yield found
    found.page.context.close()


def test_a_photo_is_predicted_and_a_setting_changes_the_prediction(
    browser: Browser, address: str, random_runs: tuple[Path, Path]
) -> None:
    from uvim_fsq.inference.predictor import Predictor

    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    browser.drop(buffer.getvalue())
    hard = browser.picture("prediction")
    for codes, shown in (("hard", hard), ("soft", "")):
        if codes == "soft":
            browser.page.locator("#codes label").nth(1).click()
            shown = browser.picture("prediction", other_than=hard)
        predictor = Predictor.from_run(random_runs[1], [f"eval.codes={codes}"])
        expected = predictor.task.render(PIXELS, predictor.predict(PIXELS))["prediction"]
        assert np.array_equal(browser.pixels(shown), expected)
    assert browser.page.locator("#text").inner_text().startswith("128 x 96 pixels")
    browser.picture("legend")
    browser.picture("tokens")
    # Nothing was asked of anything but this server.
    assert {urlsplit(url).netloc for url in browser.asked if not url.startswith(("data:", "blob:"))} == {address[7:]}
    assert not browser.problems


def test_errors_are_one_line_and_the_page_lives_on(browser: Browser) -> None:
    error = browser.page.locator("#error [role=alert]")
    for content, message in (
        (b"this is text", "the image cannot be read as an image (it is none of"),
        (png(20_000, 10_000, depth=1, colors=0), "more than twice the 25 million pixels that data.max_pixels allows"),
    ):
        browser.drop(content)
        browser.page.wait_for_function(
            "text => (document.querySelector('#error [role=alert]') || {innerText: ''}).innerText.includes(text)",
            arg=message,
        )
        assert error.count() == 1 and "\n" not in error.inner_text()
        browser.page.locator("#photo button[aria-label=Clear], #photo button[aria-label='Remove Image']").first.click()
        error.wait_for(state="hidden")
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert("P").save(buffer, "PNG")
    browser.drop(buffer.getvalue())
    browser.picture("prediction")
    browser.page.locator("#sample_count input[type=number]").fill("2")
    browser.page.keyboard.press("Tab")
    error.wait_for()
    assert "all samples would be the same, because eval.temperature is 0" in error.inner_text()


def test_a_click_on_a_token_swaps_it(browser: Browser) -> None:
    page = browser.page
    page.get_by_role("tab", name="Swap tokens").click()
    tokens = browser.picture("tokens_a")
    box = page.locator("#tokens_a img").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    changed = browser.pixels(browser.picture("tokens_a", other_than=tokens)) != browser.pixels(tokens)
    rows, columns = np.nonzero(changed.any(-1))
    cell = cell_side(4)
    assert set(rows // cell) == {0} and set(columns // cell) == {1}
    for button, swapped in (("swap_all", 4), ("swap_none", 0)):
        page.locator(f"#{button}").click()
        page.get_by_text(f"{swapped} of 4 tokens are swapped").wait_for()
