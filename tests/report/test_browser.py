"""The report in a real browser: it opens without an error and without a network, filters, hovers, and runs no text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_opd.cli import main
from tests.report.runs import make_run
from tests.report.test_page import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[test]'")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium is not installed: make install-browser")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--window-size=1400,1000")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    hostile = {"5": HOSTILE, "6": " \u202eevil", "7": "\x1b[31m red", "8": "=1+1", "3": "</s>"}
    runs = [
        make_run(folder / "paper", 200, config={"prune": {"preset": "paper"}}),
        make_run(folder / "off", 200, config={"prune": {"preset": "off"}}, texts=hostile, prompt=HOSTILE),
    ]
    out = folder / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert out.stat().st_size < 10 * 2**20
    browser.get(f"file://{out}")
    assert browser.execute_script("return document.body.dataset.opened") == "yes"  # before plotly is read
    wait(browser, lambda: browser.execute_script("return document.body.dataset.ready") == "yes")
    return browser


def wait(browser: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: condition())


def find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def text(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def choose(browser: Any, selector: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(browser, selector)[0]).select_by_value(value)


def test_it_opens_without_an_error_and_asks_no_network(opened: Any) -> None:
    assert opened.get_log("browser") == []
    asked = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []


def test_it_draws_curves_heat_maps_and_tables(opened: Any) -> None:
    assert "paper" in text(opened, "#runs-table") and "prune.preset" in text(opened, "#differences")
    assert "restart" in text(opened, "#marks") and "lengths" in text(opened, "#marks")
    assert len(find(opened, "#charts .chart")) >= 14 and len(find(opened, "#heatmaps .chart")) == 4
    for place in ("#charts .chart:last-child", "#heatmaps .chart:last-child"):
        opened.execute_script("document.querySelector(arguments[0]).scrollIntoView()", place)
        wait(opened, lambda place=place: find(opened, f"{place} svg.main-svg"))
    assert "tokens saved against that" in text(opened, "#cost-table")


def test_curves_can_be_over_tokens_and_seconds(opened: Any) -> None:
    last = "return document.querySelector('#charts .chart').data[0].x.at(-1)"
    opened.execute_script("document.querySelector('#charts .chart').scrollIntoView()")
    wait(opened, lambda: find(opened, "#charts .chart svg.main-svg"))
    restart = "return document.querySelector('#charts .chart').layout.shapes[0].x0"
    for axis, value, start in (("step", 200, 65.5), ("tokens", 800_000, 65 * 4000), ("seconds", 1980, 65 * 9.9)):
        choose(opened, "#axis", axis)
        wait(opened, lambda value=value: round(opened.execute_script(last)) == value)
        assert opened.execute_script(restart) == pytest.approx(start)
    choose(opened, "#axis", "step")


def test_responses_are_filtered_and_searched(opened: Any) -> None:
    def shown() -> int:
        return len(find(opened, "#r-list button"))

    whole = shown()
    assert whole > 20
    choose(opened, "#r-run", "0")
    one_run = shown()
    assert 0 < one_run < whole
    choose(opened, "#r-end", "drift")
    assert 0 < shown() < one_run
    assert all("stopped at drift" in item.text for item in find(opened, "#r-list button"))
    choose(opened, "#r-end", "")
    choose(opened, "#r-correct", "wrong")
    assert 0 < shown() < one_run and "wrong" in text(opened, "#r-shown")
    choose(opened, "#r-correct", "")
    search = find(opened, "#r-search")[0]
    search.send_keys("what is 1 +")
    assert 0 < shown() < one_run
    search.send_keys("no response has this")
    assert shown() == 0 and "No response is like that" in text(opened, "#r-shown")
    search.clear()
    opened.execute_script("arguments[0].dispatchEvent(new Event('input'))", search)
    assert shown() == one_run
    choose(opened, "#r-run", "")
    assert shown() == whole


def test_hovering_shows_what_both_models_say(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    choose(opened, "#r-run", "0")
    find(opened, "#r-list button")[0].click()
    tokens = find(opened, "#r-text .t")
    assert len(tokens) == 60 and "reliability spent" in text(opened, "#r-text")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[2])
    ActionChains(opened).move_to_element(tokens[2]).perform()
    wait(opened, lambda: find(opened, "#tip")[0].is_displayed())
    hint = text(opened, "#tip")
    assert '" three"' in hint and "position 2" in hint and "student 0.905" in hint and "teacher 0.497" in hint
    assert "overlap" in hint and "prune weight" in hint and "candidate" in hint
    colours = {token.value_of_css_property("background-color") for token in tokens[:50]}
    assert len(colours) > 5
    choose(opened, "#r-colour", "weight")
    weights = {token.value_of_css_property("background-color") for token in find(opened, "#r-text .t")[:50]}
    assert weights != colours
    choose(opened, "#r-colour", "overlap")
    choose(opened, "#r-run", "")


def test_texts_of_models_are_texts(opened: Any) -> None:
    choose(opened, "#r-run", "1")
    find(opened, "#r-list button")[0].click()
    shown = text(opened, "#r-text")
    assert (
        HOSTILE in shown
        and "\u27e8U+202E\u27e9evil" in shown
        and "\u27e8U+001B\u27e9[31m" in shown
        and "\u202e" not in shown
    )
    assert HOSTILE in text(opened, "#r-shown .prompt")
    assert opened.execute_script("return document.body.dataset.hacked") is None
    assert not find(opened, "main img") and opened.get_log("browser") == []
    choose(opened, "#r-run", "")
