"""Makes the pictures of docs/looking.md from runs, with headless Chromium for the report.

    python tools/pictures.py RUN [RUN ...]       e.g. runs/demo/drifting/off runs/demo/drifting/paper

The last run is the one that is shown in the terminal and response by response.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_opd.commands.report import report
from megatron_opd.commands.show import show
from megatron_opd.commands.watch import watch

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")


def browser(width: int, height: int) -> Any:
    """Headless Chromium with a window of this size. Exits where there is none."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not (chromium and driver):
        sys.exit("pictures: Chromium is not installed: make install-browser")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(driver))


def pages(runs: list[str]) -> None:
    """Curves, heat maps and a response of the report."""
    from selenium.webdriver import ActionChains

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        report(runs, str(page))
        chrome = browser(1300, 960)
        chrome.get(page.as_uri())
        for name, part in (("curves", "#curves"), ("drift", "#drift"), ("response", "#responses")):
            chrome.execute_script("document.querySelector(arguments[0]).scrollIntoView()", part)
            if name == "response":
                chrome.execute_script(
                    "const r = document.getElementById('r-run'); r.value = String(r.options.length - 2);"
                    "r.dispatchEvent(new Event('change'))"
                )
                tokens = chrome.find_elements("css selector", "#r-text .t.event")
                if tokens:
                    ActionChains(chrome).move_to_element(tokens[min(12, len(tokens) - 1)]).perform()
            time.sleep(3)  # plotly draws what has come into view
            chrome.save_screenshot(str(IMAGES / f"looking-{name}.png"))
        chrome.quit()


def terminals(run: str) -> None:
    """What `watch` and `show` print, as SVG."""
    for name, print_it in (("watch", watch), ("show", lambda folder, console: show(folder, number=1, console=console))):
        console = Console(record=True, width=110, force_terminal=True, color_system="truecolor", file=io.StringIO())
        print_it(run, console=console)
        console.save_svg(str(IMAGES / f"looking-{name}.svg"), title=f"megatron-opd {name} {Path(run).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    options = parser.parse_args()
    terminals(options.runs[-1])
    pages(options.runs)


if __name__ == "__main__":
    main()
