"""Tables of the documentation from the dated reports in tools/benchmark/results.

    python tools/benchmark/page.py           writes them into the pages, from `<!-- results: NAME -->` to `<!-- end -->`
    python tools/benchmark/page.py --check   says which page is not up to date, and ends with 1

A report is what `tools/benchmark.py NAME --json FILE` writes: what was measured, when, on what, with which versions. Of
several with the same part of `gpu` the newest is shown. What was measured before reports were kept is transcribed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "tools" / "benchmark" / "results"
PAGES = tuple(REPOSITORY / "docs" / name for name in ("performance.md", "start.md", "cluster.md"))
BLOCK = re.compile(r"(<!-- results: (?P<name>[^>]+?) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
GPU_PARTS = ("kernels", "memory", "train", "score", "steps", "fp8")


class PageError(ValueError):
    """A report or a page does not hold what it should; the message names it."""


@dataclass(frozen=True)
class Report:
    """One file of results."""

    path: Path
    values: dict[str, Any]

    @property
    def origin(self) -> str:
        """Date, device, versions and file, as a line below a table."""
        versions = ", ".join(f"{name} {number}" for name, number in self.values["versions"].items())
        said = f"{self.values['date'][:10]}, {self.values['device']}; {versions}; `{self.path.name}`"
        return f"{said}. {self.values['transcribed']}" if "transcribed" in self.values else said


def reports() -> list[Report]:
    """All of them, oldest first. Raises PageError."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in ("benchmark", "date", "device", "versions", "results") if key not in values]:
            raise PageError(f"{path.name}: no {', '.join(missing)}; a report of tools/benchmark.py has them")
        found.append(Report(path, values))
    return sorted(found, key=lambda report: report.values["date"])


def table(columns: list[str], rows: list[list[str]]) -> str:
    head = [columns, ["---"] * len(columns)]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in (*head, *rows))


def number(value: float) -> str:
    """Three significant digits, thousands apart; no exponents."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def kernels(entries: list[dict[str, Any]]) -> str:
    names = {"statistics": "log-sum-exp, top-16 and 17 chosen logits", "backward": "the gradient, in place"}
    rows = [
        [
            names[e["what"]],
            f"{e['tokens']:,}",
            str(e["tensor"]),
            f"{e['seconds'] * 1e6:,.0f} us",
            f"{e['of_floor']:.2f}",
            f"{e['faster_than_torch']:.1f}x",
        ]
        for what in names
        for e in entries
        if e["what"] == what
    ]
    copy = next(e["gb_per_s"] for e in entries if e["what"] == "copy")
    note = (
        f"\nThe floor is the time to read the shard (for the gradient: to read and write it) at the bandwidth of the "
        f"device's own copy, {copy:,.0f} GB/s. torch: log_softmax, topk and gather; for the gradient softmax and "
        "scatter_add_.\n"
    )
    return table(["kernel", "tokens", "TP", "time", "times the floor", "faster than torch"], rows) + note


def memory(entries: list[dict[str, Any]]) -> str:
    ways = {(e["what"], e["tokens"]): e for e in entries}
    rows = []
    for tokens in sorted({e["tokens"] for e in entries}):
        plain, fused = ways["plain", tokens], ways["fused", tokens]
        compared = ways["fused against plain", tokens]
        rows.append(
            [
                f"{tokens:,}",
                f"{plain['peak_bytes'] / 2**30:.2f} GiB, {plain['seconds'] * 1e3:.1f} ms",
                f"{fused['peak_bytes'] / 2**30:.2f} GiB, {fused['seconds'] * 1e3:.1f} ms",
                f"{compared['memory']:.2f}, {compared['time']:.2f}",
            ]
        )
    return table(["tokens", "whole logits: peak, time", "fused head: peak, time", "memory, time: fused of whole"], rows)


def plain(entries: list[dict[str, Any]]) -> str:
    """A table for each kind of entry, with the keys that hold single values."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for entry in entries:
        kept = {k: v for k, v in entry.items() if k != "at" and not isinstance(v, dict | list)}
        kinds.setdefault(tuple(kept), []).append([_text(name, value) for name, value in kept.items()])
    return "\n".join(
        table([name.removesuffix("_bytes").replace("_", " ") for name in columns], rows)
        for columns, rows in kinds.items()
    )


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


SHOWN: dict[str, Callable[[list[dict[str, Any]]], str]] = {"kernels": kernels, "memory": memory}


def gpu(found: list[Report], part: str) -> str:
    """The newest report's table of one part of `gpu`; without one, that and the command."""
    for report in reversed(found):
        result = report.values["results"].get(part) if report.values["benchmark"] == "gpu" else None
        if result:
            entries = [e for e in result["entries"] if "error" not in e]
            failed = len(result["entries"]) - len(entries)
            note = f" {failed} measurement(s) failed; the file says why." if failed else ""
            return f"{SHOWN.get(part, plain)(entries)}\n{report.origin}.{note}\n"
    return "Not measured yet.\n"


def transcribed(found: list[Report], name: str) -> str:
    for report in reversed(found):
        if (kept := report.values["results"].get("tables", {}).get(name)) if "transcribed" in report.values else None:
            return f"{table(kept['columns'], kept['rows'])}\n{report.origin}\n"
    raise PageError(f"no report has a table {name!r}")


def filled(text: str, found: list[Report]) -> str:
    """A page with its tables made anew. Raises PageError."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        part = name.removeprefix("gpu ")
        made = gpu(found, part) if part in GPU_PARTS else transcribed(found, name)
        return f"{match[1]}\n{made}\n{match[4]}"

    return BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a page is not up to date")
    check = parser.parse_args(arguments).check
    try:
        found = reports()
        pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
        made = {page: filled(text, found) for page, text in pages.items()}
    except PageError as error:
        print(error, file=sys.stderr)
        return 2
    old = [page for page in PAGES if made[page] != pages[page]]
    for page in old:
        print(
            f"{page.relative_to(REPOSITORY)}: {'not up to date; run tools/benchmark/page.py' if check else 'written'}"
        )
        if not check:
            page.write_text(made[page], encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
