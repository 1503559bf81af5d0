"""The page itself: template, style, script, plotly and the data, in one file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_opd.errors import InputError, describe
from megatron_opd.files import write_whole
from megatron_opd.records.lines import strict
from megatron_opd.records.run_folder import RunFolder
from megatron_opd.report.data import TOKENS, chosen_responses, run_data, settings

Judge = Callable[[RunFolder, list[dict[str, Any]]], None]


def write_report(runs: list[RunFolder], out: Path, tokens: int = TOKENS, judge: Judge | None = None) -> int:
    """Writes the page and returns its size in bytes.

    Args:
        tokens: response tokens in the page, over all runs.
        judge: sets "correct" in a run's responses.

    Raises InputError where the file cannot be written.
    """
    data: list[dict[str, Any]] = []
    for run in runs:
        responses = chosen_responses(run, tokens // len(runs))
        if judge is not None:
            judge(run, responses)
        for response in responses:
            response.pop("metadata", None)
        data.append(run_data(run, responses))
    page = render({"runs": data, "settings": settings(runs)}, " and ".join(run.name for run in runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, [page])
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {describe(error)}") from error
    return out.stat().st_size


def render(data: dict[str, Any], title: str) -> str:
    """The data stands in the page as JSON without any <, so that no text of a model can end its element."""
    from plotly.offline import get_plotlyjs  # takes half a second to import

    text = json.dumps(strict(data), separators=(",", ":"), allow_nan=False)  # ASCII alone: half characters are escapes
    for mark, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(mark, escape)
    page = _part("page.html")
    for name, part in {  # the data last: nothing is replaced in it
        "TITLE": html.escape(title.encode("utf-8", "replace").decode()),
        "STYLE": _part("page.css"),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": _part("text.js") + _part("curves.js") + _part("responses.js") + _part("page.js"),
        "DATA": text,
    }.items():
        page = page.replace(f"[[{name}]]", part)
    return page


def _part(name: str) -> str:
    return files("megatron_opd.report").joinpath("page", name).read_text(encoding="utf-8")
