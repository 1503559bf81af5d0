"""The trackers' own clients, offline: numbers, tables and files arrive, a resume goes on in the same run, and a service
that is away costs a warning and no time."""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import ConfigError, parse_config
from megatron_opd.plugins import TRACKERS, load_part
from megatron_opd.records.lines import read_steps
from megatron_opd.trackers.base import WAITING, Guarded, Tracker, TrackerSetup, flat_numbers
from megatron_opd.training.run_files import check_trackers, open_trackers
from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases

MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p.jsonl"}}
ROWS = [["2 + 2?", "<script>alert(1)</script>"], ["3?", "=1+1"]]
WAIT_S = 120.0
OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
CLIENTS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")


def needs(name: str) -> Any:
    missing = find_spec(name) is None
    return pytest.param(
        name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed: pip install '.[{name}]'")
    )


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in OFFLINE.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def session(name: str, folder: Path, first: int) -> list[str]:
    """Three steps, a table and a file; what went wrong."""
    setup = TrackerSetup(str(folder), "opd", "the run", {"train": {"lr": 0.001}}, first, {"revision": "abc"})
    tracker = Guarded(name, lambda: load_part("logging", name, TRACKERS)(setup))
    for step in range(first, first + 3):
        values = {"loss": 1 / step, "ended/eos": 3.0}
        tracker.send(lambda t, step=step, values=values: t.numbers(step, values))
    tracker.send(lambda t: t.table(first, "responses", ["prompt", "response"], ROWS))
    (folder / "kept.txt").write_text("kept")
    tracker.send(lambda t: t.artifact("kept", folder / "kept.txt"))
    return [text for text in (tracker.close(WAIT_S),) if text]


def tensorboard_numbers(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


def log_records(log: bytes) -> Iterator[bytes]:
    """Of W&B's offline file: 7 bytes of its own, then LevelDB's log format: blocks of 32 KiB with parts of records."""
    position, record = 7, b""
    while position + 7 <= len(log):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_numbers(folder: Path) -> list[tuple[int, float]]:
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
            if "loss" in items:
                found.append((json.loads(items["train_step"]), json.loads(items["loss"])))
    return found


def mlflow_numbers(folder: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(folder / "mlflow.db") as base:
        return base.execute("select step, value from metrics where key = 'loss' order by step").fetchall()


def swanlab_numbers(folder: Path) -> list[tuple[int, float]] | None:
    return None  # its offline files have a format of its own: that they are there is what can be seen


def trackio_numbers(folder: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(next((folder / "trackio").glob("*.db"))) as base:
        rows = base.execute("select step, metrics from metrics order by step, id").fetchall()
    return [(step, json.loads(text)["loss"]) for step, text in rows if "loss" in json.loads(text)]


@pytest.mark.parametrize("name", [needs(name) for name in CLIENTS])
def test_numbers_arrive_and_a_resume_goes_on_in_the_same_run(name: str, tmp_path: Path) -> None:
    assert session(name, tmp_path, 1) == []
    before = json.loads((tmp_path / "trackers.json").read_text()) if name != "tensorboard" else {}
    assert session(name, tmp_path, 4) == []
    if name != "tensorboard":
        assert json.loads((tmp_path / "trackers.json").read_text()) == before and set(before) == {name}
    numbers = globals()[f"{name}_numbers"](tmp_path)
    if numbers is None:
        files = list(tmp_path.glob(f"{name}/run-*/*.{name}"))
        assert len(files) == 2 and all(before[name] in path.name for path in files)
    else:
        assert [step for step, _ in numbers] == list(range(1, 7))
        assert [value for _, value in numbers] == pytest.approx([1 / step for step in range(1, 7)])


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed: pip install '.[mlflow]'")
def test_mlflow_has_config_tables_and_files(tmp_path: Path) -> None:
    session("mlflow", tmp_path, 1)
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        assert base.execute("select key, value from params").fetchall() == [("train.lr", "0.001")]
        assert ("revision", "abc") in base.execute("select key, value from tags").fetchall()
    (table,) = tmp_path.glob("mlflow/*/artifacts/responses/step_000001.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "response"], "data": ROWS}
    assert [path.read_text() for path in tmp_path.glob("mlflow/*/artifacts/kept/kept.txt")] == ["kept"]


class Away(Tracker):
    """A service that does not answer, or answers with errors, from some point on."""

    def __init__(self, setup: TrackerSetup, when: str = "numbers", hang: threading.Event | None = None) -> None:
        self.when, self.hang = when, hang
        self._meet("opening")

    def _meet(self, when: str) -> None:
        if when == self.when:
            if self.hang is not None:
                self.hang.wait(WAIT_S)
            raise ConnectionError("no route\n to the service")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._meet("numbers")

    def close(self) -> None:
        self._meet("closing")


SETUP = TrackerSetup("nowhere", "p", "n", {}, 1)


@pytest.mark.parametrize("when", ["opening", "numbers", "closing"])
def test_a_service_that_fails_is_one_warning(when: str) -> None:
    tracker = Guarded("Away", lambda: Away(SETUP, when))
    warnings = []
    for step in (1, 2, 3):
        tracker.send(lambda t, step=step: t.numbers(step, {}))
        tracker.settle(WAIT_S)
        warnings.append(tracker.take_warning())
    warnings.append(tracker.close(WAIT_S))
    (said,) = filter(None, warnings)
    assert "Away" in said and "ConnectionError: no route to the service" in said


def test_a_service_that_hangs_costs_no_time_and_no_memory() -> None:
    hang = threading.Event()
    tracker = Guarded("Away", lambda: Away(SETUP, "numbers", hang))
    for step in range(3 * WAITING):
        tracker.send(lambda t, step=step: t.numbers(step, {}))
    assert "are left out" in tracker.take_warning() and tracker._queue.qsize() <= WAITING
    start = time.monotonic()
    assert "has not answered" in tracker.close(0.2)
    assert time.monotonic() - start < WAIT_S / 2  # not the service's pace
    hang.set()


def test_numbers_of_inner_objects_have_paths() -> None:
    line = {"step": 3, "loss": 0.5, "ended": {"eos": 1}, "teachers": {"a": {"tokens": 7}}, "skipped": "NaN", "x": None}
    assert flat_numbers(line) == {"loss": 0.5, "ended/eos": 1, "teachers/a/tokens": 7}


def test_a_client_that_is_not_installed_is_named_before_models_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opd.training.run_files.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging: wandb is not installed; pip install 'megatron_opd\[wandb\]'"):
        check_trackers(parse_config({**MODELS, "logging": ["wandb"]}))


@pytest.mark.parametrize(
    ("logging", "more", "message"),
    [
        (["tensorboard", "tensorboard"], {}, "tensorboard is there twice"),
        (["json:dumps"], {}, "json:dumps is no subclass of megatron_opd.trackers.base.Tracker"),
        (["pathlib:Path"], {}, "pathlib:Path is no subclass"),
        (["tensorboard"], {"checkpoints": True}, "none of logging: .'tensorboard'. keeps files; add wandb or mlflow"),
        ([], {"checkpoints": True}, "keeps files"),
    ],
)
def test_what_a_tracker_cannot_do_is_refused(logging: list[str], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_trackers(parse_config({**MODELS, "logging": logging, "tracking": more}))


def test_trackers_that_are_opened_side_by_side_keep_all_ids(tmp_path: Path) -> None:
    setup, names = TrackerSetup(str(tmp_path), "p", "n", {}, 1), [f"service{i}" for i in range(24)]
    start = threading.Barrier(len(names))

    def remember(name: str) -> None:
        start.wait()
        assert setup.own_id(name) == setup.own_id(name)

    threads = [threading.Thread(target=remember, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == set(names)


def test_two_runs_of_one_name_are_two_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert len({TrackerSetup(str(tmp_path / name), "p", "first", {}, 1).own_id("trackio") for name in ("a", "b")}) == 2


def test_unknown_trackers_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of tensorboard, wandb, mlflow, swanlab, trackio, or your own"):
        parse_config({**MODELS, "logging": ["wandbb"]})


def test_no_tracker_is_no_tracker(tmp_path: Path) -> None:
    assert open_trackers(parse_config({**MODELS, "logging": [], "run_dir": str(tmp_path)}), 1) == []


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed: pip install '.[mlflow]'")
def test_a_whole_run_sends_metrics_evaluations_responses_and_checkpoints(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, train={"steps": 2, "warmup_steps": 0}, checkpoint={"every": 1})
    sets = "[{name: sums, prompts: FOLDER/prompts.jsonl, verifier: exact, max_tokens: 4, limit: 3}]"
    case = Case(
        "tracked",
        ("logging=[tensorboard, mlflow]", "tracking.checkpoints=true", f"eval.sets={sets}", "eval.every=1"),
    )
    (outcome,) = run_distributed(2, run_cases, run.folder, [case])[0]
    assert outcome.error == ""
    folder = run.folder / "tracked"
    steps = read_steps(folder / "metrics.jsonl")
    assert not any("warning" in step for step in steps)
    with sqlite3.connect(folder / "mlflow.db") as base:
        logged = base.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        accuracy = base.execute("select count(*) from metrics where key = 'accuracy/sums'").fetchone()
    assert logged == [(step["step"], step["loss"]) for step in steps] and accuracy == (2,)
    assert [value for _, value in tensorboard_numbers(folder)] == pytest.approx([step["loss"] for step in steps])
    (artifacts,) = folder.glob("mlflow/*/artifacts")
    sampled = json.loads((artifacts / "responses" / "step_000002.json").read_text())
    assert sampled["columns"][:2] == ["prompt", "response"] and len(sampled["data"]) == 4
    assert len(json.loads((artifacts / "eval" / "sums" / "step_000002.json").read_text())["data"]) == 3
    assert (artifacts / "step_000001").is_dir()
