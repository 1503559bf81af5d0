"""The report's file: what it holds of a run, also of a broken one, and what it must not hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli import main
from megatron_opd.records.run_folder import RunFolder
from megatron_opd.report.data import chosen_responses, run_data, settings, shown_setting
from megatron_opd.report.page import render, write_report
from tests.report.runs import make_run


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_command_writes_one_file_that_needs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first")
    assert main(["report", str(run)]) == 0
    out = run / "report.html"
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    plotly = page.index('id="plotly">')
    own = page[:plotly] + page[page.index("</script>", plotly) :]
    assert len(own) < 3_000_000 < len(page)
    assert not re.search(r'(src|href)="(?!#)', own)  # nothing is fetched
    data = data_of(page)
    (shown,) = data["runs"]
    assert shown["name"] == "first" and shown["series"]["step"] == list(range(1, 21))
    assert shown["series"]["accuracy/sums"][4] == pytest.approx(0.425) and shown["series"]["accuracy/sums"][0] is None
    assert shown["totals"]["sampled"] == 80_000 and shown["totals"]["to_the_cap"] == 512 * 32 * 20
    assert shown["totals"]["device_hours"] == pytest.approx(9.9 * 20 * 8 / 3600)
    assert {event["kind"] for event in shown["events"]} == {"alarm", "warning"}
    assert [start["step"] for start in shown["starts"]] == [1, 6]
    assert shown["positions"]["at"][:2] == [0, 11] and len(shown["positions"]["overlap"]) == 12
    assert {g["source"]: g["responses"] for g in shown["groups"]} == {"sums": 40, "words": 40}


def test_settings_that_differ_are_told_apart_from_those_that_do_not(tmp_path: Path) -> None:
    runs = [RunFolder(make_run(tmp_path / name, 3, config={"prune": {"preset": name}})) for name in ("paper", "off")]
    found = settings(runs)
    assert found["differ"] == {"prune.preset": ["paper", "off"]}
    assert found["same"]["train.lr"] == "1e-06"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("student.model", "/home/ada/models/Qwen3-4B", ".../Qwen3-4B"),
        ("data.prompts", "/scratch/me/p.jsonl", ".../p.jsonl"),
        ("eval.sets", '[{"prompts": "/home/ada/aime.jsonl"}]', '[{"prompts": ".../aime.jsonl"}]'),
        ("rollout.engine_options", '{"url": "http://n1:8000/v1"}', '{"url": "http://n1:8000/v1"}'),
        ("rollout.vllm.api_key", "sk-live-1", "(not shown)"),
        ("loss.options.hf_token", "hf_abc", "(not shown)"),
        ("data.prompt_key", "prompt", "prompt"),
        ("train.tokens_per_microbatch", "16384", "16384"),
    ],
)
def test_no_folders_and_no_keys_are_shown(key: str, value: str, shown: str) -> None:
    assert shown_setting(key, value) == shown


def test_no_path_of_the_machine_is_in_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", 3)
    main(["report", str(run), "--no-judge"])
    page = (run / "report.html").read_text()
    assert "/secret/place" not in page and str(tmp_path) not in page


HACK = "document.body.dataset.hacked='yes'"
HOSTILE = f'</script><script>{HACK}</script><img src=x onerror="{HACK}">'


def test_no_text_of_a_model_can_end_the_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", 2, texts={"5": HOSTILE, "6": "\ud83d", "7": "<!--"}, prompt=HOSTILE)
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert HOSTILE not in page and "<!--" not in data_text(page)
    assert data_of(page)["runs"][0]["responses"][0]["prompt"] == HOSTILE


def data_text(page: str) -> str:
    return page[page.index('id="data">') : page.index("</script>", page.index('id="data">'))]


def test_a_mark_of_the_template_in_a_text_stays_a_text(tmp_path: Path) -> None:
    page = render({"runs": [], "settings": {"same": {"a": "[[SCRIPT]] [[DATA]]"}, "differ": {}}}, "[[DATA]]")
    assert data_of(page)["settings"]["same"]["a"] == "[[SCRIPT]] [[DATA]]"


def test_the_size_is_bounded_whatever_was_recorded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 200, responses=4, length=400)
    size = write_report([RunFolder(run)], tmp_path / "r.html")
    assert size < 10 * 2**20
    chosen = chosen_responses(RunFolder(run), 40_000)
    assert 60 <= len(chosen) <= 100 and {r["step"] for r in chosen} & set(range(180, 201))


def test_a_long_response_is_cut_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 1, responses=1, length=9000)
    (response,) = chosen_responses(RunFolder(run), 40_000)
    assert response["shown"] == 8000 == len(response["ids"]) and response["length"] == 9000


def test_right_answers_are_known_where_the_verifier_is_the_packages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", 1, responses=3, length=3, texts={"5": "one", "6": " two", "7": " three"})
    main(["report", str(run)])
    responses = data_of((run / "report.html").read_text())["runs"][0]["responses"]
    assert [r.get("correct") for r in responses] == [True, None, None]  # the others have the run's own reward
    own = make_run(tmp_path / "own", 1, config={"data": {"verifier": "evil:run"}})
    main(["report", str(own)])
    assert "correct" not in data_of((own / "report.html").read_text())["runs"][0]["responses"][0]


BROKEN = {
    "empty": {},
    "torn": {"metrics.jsonl": b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo'},
    "other types": {
        "metrics.jsonl": b'{"step": 1, "ended": 3, "accuracy": [1], "alarms": "x", "loss": "high", "a": {"b": null}}\n',
        "positions.jsonl": b'{"step": 1, "width": "x", "tokens": 3}\n',
        "starts.jsonl": b'{"step": "1"}\n[]\n',
    },
    "no responses": {"metrics.jsonl": b'{"step": 1}\n', "responses/step_000001.json.gz": b"torn"},
    "no config": {"metrics.jsonl": b'{"step": 1}\n', "config.yaml": b"a: [1\n"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_crash_leaves_can_be_shown(name: str, tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    (tmp_path / "config.yaml").write_text("train: {steps: 3}\n")
    for file, content in BROKEN[name].items():
        (tmp_path / file).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 0
    assert run_data(RunFolder(tmp_path), [])["state"] == "ended"


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["."], ["run", "--out", "run/config.yaml/r.html"], ["run", "nowhere"]]
)
def test_what_cannot_be_shown_is_said(arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", 1)
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err.startswith("megatron-opd: ")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run", 1), make_run(tmp_path / "b" / "run", 1)
    main(["report", str(first), str(second), "--out", str(tmp_path / "r.html")])
    assert [r["name"] for r in data_of((tmp_path / "r.html").read_text())["runs"]] == ["a/run", "b/run"]
