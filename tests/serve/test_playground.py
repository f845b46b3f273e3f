"""The page at /, in a real browser."""

import itertools
import shutil
from collections.abc import Iterator

import pytest
from support.models import byte_transformer
from support.serving import serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to show the page in")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    problems = []
    page.on(
        "console", lambda message: problems.append(message.text) if _is_error(message) else None
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    wait_for(page, "#model option")
    page.set_default_timeout(10_000)
    yield page
    page.close()
    assert problems == []


def _is_error(message) -> bool:
    """But for the browser's own line on an answer of 422."""
    return message.type == "error" and "status of 422" not in message.text


def wait_for(page, selector: str) -> None:
    """Until there is such an element. The page's policy allows no script to be made of text, as
    Playwright's other ways to wait do."""
    page.locator(selector).first.wait_for(state="attached")


def run(page) -> None:
    page.locator("#length").fill("10")
    page.locator("#text").press("Control+Enter")
    wait_for(page, "#live:not(:empty)")


def test_a_text_is_filled_and_its_tokens_have_the_colours_of_their_experts(page):
    assert "<extra_id_0>" in page.locator("#text").input_value()
    run(page)
    assert page.locator(".result mark").count() == 2
    assert page.locator(".input .token").count() == len("The <0> of the list is <1>.") - 4 + 1
    assert 1 <= page.locator(".output .token").count() <= 10
    first = page.locator(".output .token").first
    assert "of decoder.1" in first.get_attribute("aria-label")
    assert first.evaluate("token => token.style.getPropertyValue('--hue')") != ""
    assert "tokens, " in page.locator(".speed").inner_text()
    assert "MB" in page.locator("#numbers").inner_text()


def test_a_token_tells_how_sure_the_router_was(page):
    run(page)
    for side, layer in (("input", "encoder.1"), ("output", "decoder.1")):
        token = page.locator(f".{side} .token").nth(0)
        token.focus()
        token.press("Enter")
        box = page.locator(".router .layers > *", has_text=layer)
        box.wait_for()
        shares = box.locator("meter").evaluate_all("meters => meters.map(m => m.value)")
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        told = box.locator("td").first.inner_text()
        assert told in token.get_attribute("aria-label")


def test_the_map_counts_tokens_of_all_runs_until_it_is_emptied(page):
    run(page)
    shown = page.locator(".input .token").count()

    def total() -> int:
        row = page.locator("#maps tr", has_text="encoder.1").locator("td")
        return sum(map(int, row.all_inner_texts()))

    assert total() == shown
    page.evaluate("document.querySelector('#live').textContent = ''")
    run(page)
    assert total() == 2 * shown
    page.locator("#reset").click()
    assert page.locator("#heat").is_hidden()


def test_alternatives_and_two_models_stand_beside_one_another(page):
    page.locator("#other").select_option("causal")
    page.locator("#text").fill("A list")
    page.locator("#alternatives").fill("3")
    page.locator("#length").fill("6")
    page.locator("#run").click()
    page.locator(".others:not([hidden]) li").nth(5).wait_for()
    assert page.locator(".answer h2").all_inner_texts() == ["filler", "causal"]


def test_what_a_model_writes_is_text_and_no_page(page):
    page.locator("#text").fill("<img src=x onerror=alert(1)> <b>bold</b> <extra_id_0>")
    run(page)
    assert page.locator("#answers img, #answers b").count() == 0
    assert "<b>bold</b>" in page.locator(".result").inner_text()


def test_a_refusal_is_told_in_words(page):
    page.locator("#text").fill("x" * 3000)
    page.locator("#text").press("Control+Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "--max-input" in page.locator("#error").inner_text()


def test_the_page_fits_a_phone_a_small_and_a_wide_window_by_day_and_night(page):
    run(page)
    page.locator(".output .token").first.click()
    page.wait_for_selector(".router meter")
    backgrounds = set()
    for width, scheme in itertools.product((390, 500, 1200), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_a_server_with_a_key_asks_for_it_once(browser, monkeypatch):
    monkeypatch.setenv("SWITCHWORKS_API_KEY", "secret")
    with serving({"filler": byte_transformer(decoder_only=False)}) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#key:not([hidden])")
        page.locator("#secret").fill("secret")
        page.locator("#secret").press("Enter")
        wait_for(page, "#model option")
        assert page.locator("#key").is_hidden()
        run(page)
        page.close()
