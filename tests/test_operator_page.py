"""The operator's page as a person uses it, in this machine's own Chromium.

`make picture` takes the picture of it for the docs.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from playwright.sync_api import Browser, Page, expect, sync_playwright
from watched_app import TOKEN, WatchedApp, served

from meanet.artifact import TrainedModel
from meanet.data import Splits
from meanet.preprocessing import encode_png

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
PICTURE = "MEANET_PICTURE"
"""Where to leave the picture, if it is wanted."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def bodies(splits: Splits) -> list[bytes]:
    return [encode_png(image) for image in splits.table.images[splits.test]]


@pytest.fixture
def app(model: TrainedModel) -> WatchedApp:
    return WatchedApp(model)


@pytest.fixture
def url(app: WatchedApp) -> Iterator[str]:
    with served(app.app) as url:
        yield url


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """The page; whatever it throws, logs as an error or fetches from elsewhere fails the test."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    page, own = context.new_page(), (url, f"blob:{url}", "data:")
    troubles: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith(own) else None)
    page.goto(url)
    yield page
    context.close()
    assert troubles == []
    assert elsewhere == []


def drop(page: Page, body: bytes, name: str = "digit.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": body})


def slide(page: Page, place: int) -> None:
    page.locator("#slider").evaluate(
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }", place
    )


def test_shares_latency_joules_and_breaker_are_live(
    browser: Browser, url: str, app: WatchedApp, bodies: list[bytes]
) -> None:
    with opened(browser, url) as page, httpx.Client(base_url=url) as client:
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#breaker")).to_have_text("closed")
        exits = [client.post("/v1/classify", content=body).json()["exit"] for body in bodies[:60]]
        for exit_ in ("main", "extension", "cloud"):
            share = f"{exit_} {100 * exits.count(exit_) / len(exits):.1f}%"
            expect(page.locator(f"#share-{exit_}")).to_have_text(share, timeout=10_000)
        expect(page.locator("#rate-note")).to_contain_text("60 in all")
        expect(page.locator("#latency")).to_contain_text(" ms")
        expect(page.locator("#joules")).to_contain_text("J")
        assert page.locator("#series rect").count() >= 1
        app.cloud.well = False
        for body in bodies[:6]:
            client.post("/v1/classify?threshold=-1", content=body).raise_for_status()
        expect(page.locator("#breaker")).to_have_text("open", timeout=10_000)
        expect(page.locator("#troubles")).to_contain_text("3 images: circuit open")


def test_a_dropped_image_shows_the_block_that_answered_and_why(browser: Browser, url: str, bodies: list[bytes]) -> None:
    wanted = {}
    for body in bodies:
        answer = httpx.post(f"{url}/v1/classify", content=body).json()
        wanted.setdefault(answer["exit"], (body, answer))
    assert len(wanted) == 3
    says = {"main": "easy class", "extension": "the extension block ran", "cloud": "above the threshold"}
    with opened(browser, url) as page:
        for exit_, (body, answer) in wanted.items():
            drop(page, body)
            expect(page.locator("#exit")).to_have_text(exit_)
            expect(page.locator("#class")).to_have_text(answer["class_name"])
            expect(page.locator("#why")).to_contain_text(says[exit_])
            expect(page.locator("#numbers")).to_contain_text(f"{answer['entropy']:.4f} nats")
        drop(page, b"this is no image")
        expect(page.locator("#refusal")).to_contain_text("no readable PNG or JPEG")
        expect(page.locator("#result")).to_be_hidden()


def test_dropping_works_by_mouse_too(browser: Browser, url: str, bodies: list[bytes]) -> None:
    with opened(browser, url) as page:
        handle = page.evaluate_handle(
            """(bytes) => { const moved = new DataTransfer();
               moved.items.add(new File([new Uint8Array(bytes)], "digit.png", { type: "image/png" }));
               return moved; }""",
            list(bodies[0]),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": handle})
        answer = httpx.post(f"{url}/v1/classify", content=bodies[0]).json()
        expect(page.locator("#class")).to_have_text(answer["class_name"])


def test_the_slider_tries_another_point_on_this_image_alone(browser: Browser, url: str, bodies: list[bytes]) -> None:
    along = httpx.get(f"{url}/v1/front").json()["along"]
    with opened(browser, url) as page:
        expect(page.locator("#expected")).to_contain_text("In force: threshold")
        assert page.locator("#now").count() == 1
        drop(page, bodies[0])
        slide(page, len(along) - 1)
        expect(page.locator("#exit")).to_have_text("cloud")
        point = along[-1]
        expect(page.locator("#expected")).to_contain_text(f"{100 * point['accuracy']:.1f}% accurate")
        expect(page.locator("#expected")).to_contain_text("100.0% to the cloud")
        assert page.locator("#tried").count() == 1
        slide(page, 0)
        expect(page.locator("#exit")).not_to_have_text("cloud")
        expect(page.locator("#expected")).to_contain_text("never")
        page.click("#back")
        expect(page.locator("#expected")).to_contain_text("In force")
        assert page.locator("#tried").count() == 0
    everybody = httpx.post(f"{url}/v1/classify", content=bodies[0]).json()
    assert everybody["policy"]["thresholds"] == httpx.get(f"{url}/v1/front").json()["policy"]["thresholds"]


def test_a_point_is_put_in_force_with_the_token_alone(browser: Browser, url: str, app: WatchedApp) -> None:
    before, along = app.service.served.policy.thresholds, httpx.get(f"{url}/v1/front").json()["along"]
    with opened(browser, url) as page:
        expect(page.locator("#apply")).to_be_visible()
        slide(page, 1)
        page.click("#apply-button")
        expect(page.locator("#applied")).to_have_text("Refused: a token is wanted")
        assert app.service.served.policy.thresholds == before
        page.fill("#token", TOKEN)
        page.click("#apply-button")
        expect(page.locator("#expected")).to_contain_text(f"In force: threshold {along[1]['thresholds'][0]:.4f}")
    assert list(app.service.served.policy.thresholds) == along[1]["thresholds"]


def test_names_of_classes_are_text(browser: Browser, model: TrainedModel, bodies: list[bytes]) -> None:
    evil = dataclasses.replace(model, class_names=("<img src=x onerror=alert(1)>", *model.class_names[1:]))
    with served(WatchedApp(evil).app) as url, opened(browser, url) as page:
        for body in bodies:
            answer = httpx.post(f"{url}/v1/classify", content=body).json()
            if answer["class_id"] == 0:
                break
        drop(page, body)
        expect(page.locator("#class")).to_have_text("<img src=x onerror=alert(1)>")
        assert page.locator("img").count() == 1, "the preview"


def test_a_lost_server_is_said(browser: Browser, app: WatchedApp) -> None:
    with contextlib.ExitStack() as stack:
        with served(app.app) as url:
            page = stack.enter_context(opened(browser, url))
            expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#connection")).to_contain_text("no connection", timeout=15_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_is_named_for_readers(browser: Browser, url: str, scheme: str) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with opened(browser, url, **options) as page:
        expect(page.locator("#connection")).to_have_text("live")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        expect(page.locator("#slider")).to_have_accessible_name(
            "Try another point: more edge on the left, more cloud on the right"
        )
        page.focus("#slider")
        page.keyboard.press("End")
        expect(page.locator("#expected")).to_contain_text("100.0% to the cloud")
        for svg in page.locator("svg").all():
            assert svg.get_attribute("aria-label")


def test_nothing_may_be_loaded_or_framed(url: str) -> None:
    headers = httpx.get(url).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.skipif(PICTURE not in os.environ, reason=f"set {PICTURE} to the file to write (make picture)")
def test_picture(browser: Browser, url: str, app: WatchedApp, bodies: list[bytes]) -> None:
    path = ROOT / Path(os.environ[PICTURE])
    view = {"width": 1180, "height": 1000}
    with opened(browser, url, viewport=view, device_scale_factor=1, color_scheme="light") as page:
        shown = b""
        with httpx.Client(base_url=url) as client:
            for number, body in enumerate(bodies * 2):
                app.cloud.well = not 150 <= number < 155
                answer = client.post("/v1/classify", content=body).json()
                if answer["exit"] == "extension":
                    shown = body
                page.wait_for_timeout(5 + 25 * (number % 60 > 30))
        drop(page, shown)
        expect(page.locator("#exit")).to_have_text("extension")
        slide(page, 22)
        expect(page.locator("#tried")).to_have_count(1)
        page.wait_for_timeout(1500)
        page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 20_000
