"""The documentation's tables of results: made from dated reports, and up to date."""

from __future__ import annotations

import json
import sys

import pytest

from tests.tiny_run import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
from benchmark import gpu, page  # noqa: E402


def report(tmp_path, monkeypatch, name, **values):
    given = {"benchmark": "gpu", "date": "2026-01-02", "device": "a GPU", "versions": {"torch": "9"}, "results": {}}
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    (tmp_path / name).write_text(json.dumps(given | values))


def part(*entries):
    return {"status": "finished", "seconds": 1.0, "entries": list(entries)}


def test_every_page_is_up_to_date():
    found = page.reports()
    for path in page.PAGES:
        text = path.read_text()
        assert page.BLOCK.search(text), f"{path} shows no results"
        assert page.filled(text, found) == text, f"{path} is not up to date: run tools/benchmark/page.py"


def test_every_part_of_the_gpu_benchmark_has_its_place():
    text = page.PAGES[0].read_text()
    for name in gpu.PARTS:
        assert f"<!-- results: gpu {name} -->" in text
    assert set(page.GPU_PARTS) == set(gpu.PARTS)


def test_the_newest_report_of_a_part_is_shown_with_its_origin(tmp_path, monkeypatch):
    old = {
        "train": part({"model": "0.6B", "tokens_per_s": 1111.4}),
        "score": part({"model": "8B", "tokens_per_s": 7.0}),
    }
    report(tmp_path, monkeypatch, "b.json", results=old)
    new = {
        "train": part({"model": "0.6B", "tokens_per_s": 2222.6, "spread": {}}, {"model": "4B", "error": "no memory"})
    }
    report(tmp_path, monkeypatch, "a.json", date="2026-03-04", results=new)
    text = "<!-- results: gpu train -->\n<!-- end -->\n<!-- results: gpu score -->\n<!-- end -->\n"
    made = page.filled(text, page.reports())
    assert "| model | tokens per s |\n| --- | --- |\n| 0.6B | 2,223 |\n" in made and "1,111" not in made
    assert "2026-03-04, a GPU; torch 9; `a.json`. 1 measurement(s) failed" in made
    assert "| 8B | 7 |" in made and "`b.json`" in made
    assert page.filled(made, page.reports()) == made


def test_what_nobody_has_measured_says_so(tmp_path, monkeypatch):
    report(tmp_path, monkeypatch, "a.json", results={"train": part()})
    made = page.filled("<!-- results: gpu fp8 -->\n<!-- end -->", page.reports())
    assert "Not measured yet." in made


def test_a_report_without_its_date_and_a_table_that_nobody_has_are_refused(tmp_path, monkeypatch):
    report(tmp_path, monkeypatch, "a.json")
    with pytest.raises(page.PageError, match="no report has a table 'nothing'"):
        page.filled("<!-- results: nothing -->\n<!-- end -->", page.reports())
    (tmp_path / "b.json").write_text(json.dumps({"benchmark": "gpu", "results": {}}))
    with pytest.raises(page.PageError, match="b.json: no date, device, versions"):
        page.reports()


def test_check_names_the_page_and_changes_nothing(tmp_path, monkeypatch, capsys):
    report(tmp_path, monkeypatch, "a.json")
    stale = tmp_path / "performance.md"
    stale.write_text("<!-- results: gpu train -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(page, "PAGES", (stale,))
    monkeypatch.setattr(page, "REPOSITORY", tmp_path)
    assert page.main(["--check"]) == 1 and "old" in stale.read_text()
    assert "performance.md: not up to date" in capsys.readouterr().out
    assert page.main([]) == 0 and "Not measured yet." in stale.read_text()
    assert page.main(["--check"]) == 0
