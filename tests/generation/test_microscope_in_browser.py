"""The microscope's page in headless Chromium: clicks, keys, what a screen reader finds, and that
text from a model stays text. Needs Playwright and a Chromium (or Chrome) that is installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_gpt2 import make_model

from micrograd_gpt.generation.context import Continuation
from micrograd_gpt.generation.microscope import attribution, observe
from micrograd_gpt.generation.microscope_page import write_page
from micrograd_gpt.text.tokenizers import WordTokenizer

try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # type: ignore[assignment]
pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='hacked'</script>"
WORDS = [HOSTILE, "<b>bold</b>", " the", "\n", "\u202eevil", "", "fox", "dog", "runs", "far", "off"]
IDS = [2, 6, 0, 1, 3, 2, 7, 4, 5, 8, 9, 10, 2, 6, 8]
PROMPT = 4


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(names)}")
    sandbox = [] if os.name == "nt" or os.getuid() else ["--no-sandbox"]  # it refuses root
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    tokenizer = WordTokenizer.from_text("a b c d e f g h i j")
    tokenizer.tokens = [word.encode() for word in WORDS]
    model = make_model(n_layer=3)
    write_page(str(path), model, tokenizer, [Continuation(ids=IDS, n_prompt=PROMPT)])
    return path


@pytest.fixture(params=[(1300, "light"), (360, "dark")], ids=["wide, light", "narrow, dark"])
def page(browser: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; whatever goes wrong in it fails the test."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda asked: problems.append(asked.url) if asked.url != url else None)
    url = file.as_uri()
    page.goto(url)
    yield page
    page.close()
    assert problems == []


def chosen(page: Any) -> int:
    """Which token is chosen; there is one, everywhere the same."""
    pressed = page.locator("#text button[aria-pressed=true]")
    assert pressed.count() == 1
    place = pressed.evaluate("button => [...button.parentElement.children].indexOf(button)")
    assert page.locator("#current").inner_text().startswith(f"{place + 1} of {len(IDS)}")
    return int(place)


def test_it_opens_at_the_first_new_token_and_clicks_go_to_others(page: Any) -> None:
    assert chosen(page) == PROMPT
    page.click("#text button:nth-child(8)")
    assert chosen(page) == 7
    assert "fox" not in page.locator("#alternatives h3").inner_text()
    page.click("#next")
    assert chosen(page) == 8
    page.click("#lens tbody tr:first-child td:nth-child(4)")
    assert chosen(page) == 3
    box = page.locator("#large").bounding_box()
    page.click("#large", position={"x": 5, "y": box["height"] * 9.5 / len(IDS)})
    assert chosen(page) == 10


def test_the_alternatives_are_the_token_and_ten_others(page: Any) -> None:
    page.click("#text button:nth-child(7)")
    rows = page.locator("#alternatives tbody tr")
    assert rows.count() == 11
    assert rows.filter(has_text="came").count() == 1
    assert "dog" in rows.filter(has_text="came").inner_text()


def test_a_click_on_a_map_shows_what_its_head_looked_at(page: Any) -> None:
    page.click("#text button:nth-child(12)")
    page.click("#maps button[aria-label='layer 2, head 1']")
    assert page.locator("#head-name").inner_text() == "Layer 2, head 1"
    weights = observe(make_model(n_layer=3), IDS).attention[1, 0, 10]
    rows = page.locator("#looks-at tbody tr")
    most = np.argsort(-weights)[:5]
    assert [int(row.split("\t")[0]) - 1 for row in rows.all_inner_texts()] == most.tolist()
    shown = [float(row.split("\t")[2].strip("<%")) for row in rows.all_inner_texts()]
    np.testing.assert_allclose(shown, 100 * weights[most], atol=1)
    lines = page.locator("#lines path").count()
    assert lines == min(8, sum(weights >= 0.03)) and lines > 0


def test_what_moved_the_logit_sums_to_it(page: Any) -> None:
    page.click("#text button:nth-child(10)")
    rows = [row.split("\t") for row in page.locator("#movers tbody tr").all_inner_texts()]
    moved = [float(row[1].replace("−", "-")) for row in rows]
    assert len(moved) == 12 and rows[10][0] == "5 other parts together"
    model = make_model(n_layer=3)
    logit = attribution(model, observe(model, IDS), IDS[1:]).total()[8]
    assert moved[-1] == pytest.approx(logit, abs=0.01)
    assert sum(moved[:-1]) == pytest.approx(moved[-1], abs=0.07)  # of numbers with two decimals
    assert page.locator("#moves tbody tr").count() == 3


def test_the_keyboard_reaches_everything(page: Any) -> None:
    page.keyboard.press("Tab")
    assert chosen(page) == PROMPT  # the group's one tab stop is the chosen token
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert chosen(page) == PROMPT + 2
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == 1  # the first one is not predicted
    page.keyboard.press("End")
    assert chosen(page) == len(IDS) - 1
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.locator("#head-name").inner_text() == "Layer 2, head 1"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.locator("#head-name").inner_text() == "Layer 1, head 1"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "layer 1, head 1"


def test_a_screen_reader_finds_names_and_numbers(page: Any) -> None:
    for button in page.get_by_role("button").all():
        assert button.evaluate("b => (b.ariaLabel ?? b.textContent).trim()")
    fox = page.get_by_role("toolbar", name="Tokens of the text").get_by_role("button").nth(1)
    assert "fox, probability" in fox.get_attribute("aria-label")
    regions = page.get_by_role("region")
    assert regions.count() == 5 and regions.nth(1).get_by_role("heading", level=2).count() == 1
    for table in page.locator("table").all():
        named = table.locator("caption").count() or table.get_attribute("aria-label")
        assert named and table.locator("th[scope=col]").count() > 1
    assert page.locator("[aria-live=polite]").count() == 2


def test_text_from_a_model_stays_text(page: Any) -> None:
    assert page.title() == "Microscope"
    assert page.locator("main script, main b").count() == 0
    texts = page.locator("#text button").all_inner_texts()
    assert texts[2] == HOSTILE and texts[3] == "<b>bold</b>"
    assert texts[4] == "⏎" and texts[5] == "·the"
    assert texts[7] == "\\u202eevil"  # it would turn the line around
    assert texts[8] == "∅"


def test_it_fits_the_window_and_the_text_can_be_read(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = (np.array([int(n) for n in c[4:-1].split(",")]) / 255 for c in colours)
    assert contrast(ink, paper) > 7  # WCAG's AAA


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The contrast of two sRGB colours, 1 to 21, as WCAG 2 defines it."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (one, other)]
    dark, light = sorted(float(c @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in linear)
    return light / dark


def test_it_prints_without_its_controls(page: Any) -> None:
    assert page.locator("#steer").is_visible()
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1046})  # A4 within its margins
    assert not page.locator("#steer").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_prints_dark_on_light(page: Any) -> None:
    blue = (
        "[...find('maps').querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    page.emulate_media(media="print")
    colours = "getComputedStyle(document.body)"
    assert page.evaluate(f"{colours}.color") == "rgb(27, 31, 36)"
    assert page.evaluate(f"{colours}.backgroundColor") == "rgb(252, 252, 250)"
    assert page.evaluate(blue)[:3] == [31, 111, 235]


@pytest.mark.parametrize("heads", [12, 25])
def test_all_heads_are_on_a_printed_page(browser: Any, tmp_path: Path, heads: int) -> None:
    path = tmp_path / "page.html"
    model = make_model(n_layer=1, n_head=heads, n_embd=4 * heads, vocab_size=16)
    tokenizer = WordTokenizer.from_text("a b c d e f g h i j")
    write_page(str(path), model, tokenizer, [Continuation(ids=[2, 3, 4], n_prompt=1)])
    page = browser.new_page(viewport={"width": 718, "height": 1046})
    page.goto(path.as_uri())
    page.emulate_media(media="print")
    for table in ("maps", "moves"):
        assert page.locator(f"#{table} thead th").count() >= heads + 1
        assert page.evaluate(
            f"find('{table}').getBoundingClientRect().right <= document.body.clientWidth"
        )
    page.close()
