"""Runs as pandas frames, against the files that they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd import analysis
from megatron_opd.errors import InputError
from megatron_opd.records.lines import read_steps
from tests.report.runs import make_run


def test_metrics_are_the_lines(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", 10), make_run(tmp_path / "b", 4)
    frame = analysis.metrics(first, second)
    assert list(frame.index) == [*range(1, 11), *range(1, 5)] and set(frame["run"]) == {"a", "b"}
    lines = read_steps(first / "metrics.jsonl")
    of_first = frame[frame["run"] == "a"]
    assert list(of_first["loss"]) == [line["loss"] for line in lines]
    assert of_first["accuracy/sums"].dropna().to_dict() == {5: 0.55, 10: 0.8}
    assert of_first["tokens_so_far"].iloc[-1] == 40_000 and of_first["seconds_so_far"].iloc[-1] == pytest.approx(99)
    assert list(of_first["ended/drift"]) == [4] * 10


def test_settings_stand_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 1, config={"prune": {"preset": name}}) for name in ("paper", "off")]
    frame = analysis.settings(*runs)
    assert frame.loc["prune.preset"].to_dict() == {"paper": "paper", "off": "off"}


def test_responses_and_their_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 2, responses=3, length=20)
    responses, tokens = analysis.responses(run), analysis.tokens(run)
    assert len(responses) == 6 and len(tokens) == 120
    assert list(responses["end_reason"]) == ["eos", "length", "drift"] * 2
    assert responses["text"][0].startswith("one two three\n</s>one")
    one = tokens[tokens["response"] == 1]
    assert list(one["position"]) == list(range(20)) and one["token"].iloc[1] == " two"
    assert one["overlap"].mean() == pytest.approx(responses["overlap"][1])
    assert one["overlap"].isna().sum() == 1 and one["teacher_logprob"].isna().sum() == 1  # the last was not read
    assert int(one["drift"].sum()) in (responses["events"][1] - 1, responses["events"][1])


def test_drift_by_position(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 3)
    frame = analysis.drift(run)
    line = read_steps(run / "positions.jsonl")[1]
    second = frame[frame["step"] == 2]
    assert list(second["position"]) == [11 * b for b in range(12)]
    for key in ("tokens", "overlap", "events", "spent"):
        assert list(second[key]) == line[key]


def test_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1)
    (run / "eval").mkdir()
    record = {"response": "4", "correct": True}
    (run / "eval" / "aime-24-step10.jsonl").write_text(json.dumps(record) + '\n{"torn')
    frame = analysis.evaluations(run)
    assert frame.to_dict("records") == [{"run": "a", "set": "aime-24", "step": 10, **record}]


def test_a_run_that_has_just_begun_gives_empty_frames(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    for frame in (analysis.metrics, analysis.responses, analysis.tokens, analysis.drift, analysis.evaluations):
        assert frame(tmp_path).empty
    with pytest.raises(InputError, match="no run of megatron-opd"):
        analysis.metrics(tmp_path / "nowhere")
