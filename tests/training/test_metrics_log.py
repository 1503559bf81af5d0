"""metrics.jsonl is strict JSON, survives what a crash leaves in it, and no view of it ends a run."""

from __future__ import annotations

import json
import math

import pytest
import torch.utils.tensorboard

from megatron_opd.records.lines import read_steps
from megatron_opd.trackers.base import Guarded, TrackerSetup
from megatron_opd.trackers.tensorboard import TensorBoard
from megatron_opd.training.metrics_log import MetricsLog, was_reported

TAILS = {
    "torn": b'{"step": 3, "lo',
    "NUL": b"\0" * 64,
    "no UTF-8": b"\xff\xfe\x80",
    "no object": b"[3]\n3\nnull\n",
    "no step": b'{"loss": 1}\n{"step": "3"}\n{"step": true}\n',
    "deep": b"[" * 100_000,
}


def strictly(text: str):
    """Parsed by the letter of JSON, which knows no NaN and no Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_no_steps_line_does_not_stop_a_resume(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n' + TAILS[tail])
    assert was_reported(str(tmp_path), 2) and not was_reported(str(tmp_path), 3)
    log = MetricsLog(str(tmp_path), 2)
    assert log.write({"step": 2, "loss": 0.125}) == ""
    log.close()
    assert strictly(path.read_text()) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]


def test_of_a_doubled_step_the_last_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 1, "loss": 3}\n{"step": 2, "loss": 4}\n')
    assert read_steps(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 4}]
    MetricsLog(str(tmp_path), 3).close()
    assert strictly(path.read_text()) == read_steps(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 4}]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')  # of an earlier release
    log = MetricsLog(str(tmp_path), 2)
    log.write({"step": 2, "loss": math.inf, "accuracy": {"a": math.nan, "b": 0.5}, "list": [1, -math.inf]})
    log.close()
    assert strictly((tmp_path / "metrics.jsonl").read_text()) == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "accuracy": {"a": None, "b": 0.5}, "list": [1, None]},
    ]


class Broken:
    """A TensorBoard that fails when it is made, written to or closed."""

    def __init__(self, when: str):
        self.when = when

    def __call__(self, *_, **__):
        if self.when == "made":
            raise RuntimeError("no event file")
        return self

    def add_scalar(self, *_):
        if self.when == "written":
            raise ValueError("the writing thread is gone")

    def close(self):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("when", ["made", "written", "closed"])
def test_a_tensorboard_that_fails_is_said_once_and_ends_nothing(when, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", Broken(when))
    setup = TrackerSetup(str(tmp_path), "project", "run", {}, 1)
    board = Guarded("TensorBoard", lambda: TensorBoard(setup))
    log = MetricsLog(str(tmp_path), 1, [board])
    for step in (1, 2, 3):
        board.settle(60)  # its thread has seen what came before
        values = {"step": step, "loss": 0.5}
        if step == 2:
            values["warning"] = "SAVING FAILS"
        assert log.write(values) == ""
    log.close()
    warnings = [line.get("warning") or "" for line in strictly((tmp_path / "metrics.jsonl").read_text())]
    assert warnings[1].startswith("SAVING FAILS") and not warnings[2]
    assert ["TensorBoard" in text for text in warnings] == [when == "made", when == "written", False]
    assert ("No space left" in capsys.readouterr().out) is (when == "closed")
