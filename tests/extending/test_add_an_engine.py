"""The rollout engine of docs/extending, in real runs: separate, until spent, in flight and fused. It samples with the
package's sampler, so each run has a run of the Megatron engine with the same tokens to be compared with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.rollout.base import EngineSetup, RolloutEngine
from megatron_opd.types import Rollout
from tests.distributed import run_distributed
from tests.extending.own_engine import TransformersEngine
from tests.tiny_run import Case, Outcome, TinyRun, run_cases

HERE = Path(__file__).parent
OWN = "rollout.engine=tests.extending.own_engine:TransformersEngine"
MODES = {
    "separate": (),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "in_flight": ("prune.preset=in_flight", "prune.segment=4"),
    "fused": ("score.mode=fused", "teacher.parallel={tensor: 2, sequence: true}"),
}
EVALUATED = (
    "eval.at_start=true",
    "eval.sets=[{name: sums, prompts: FOLDER/prompts.jsonl, verifier: exact, max_tokens: 4, limit: 2}]",
)
SHORT: dict[str, Any] = {"train": {"steps": 2, "warmup_steps": 0}, "checkpoint": {"every": 0}, "prune": {"w_drop": 0.2}}
ENGINES_OWN = (
    *("rollout_logprob_gap_mean", "rollout_logprob_gap_max", "rollout_logprob_gap_count"),
    *("rollout_mismatch", "importance_mean", "importance_ess"),
)
PROBED = ("sync_logprob_gap", "teacher_logprob_gap")


class KeepsItsParameters(TransformersEngine):
    def update_parameters(self, named_parameters: Any, version: int) -> None:
        for _ in named_parameters():
            pass
        self.policy_version = version


class CannotProbe(RolloutEngine):
    def __init__(self, setup: EngineSetup) -> None: ...

    def update_parameters(self, named_parameters: Any, version: int) -> None: ...

    def generate(self, *arguments: Any, **keywords: Any) -> list[Rollout]: ...


class TooLong(TransformersEngine):
    def generate(self, requests: Any, sampling: Any, *others: Any) -> list[Rollout]:
        return super().generate(requests, replace(sampling, max_tokens=sampling.max_tokens + 3), *others)


class Backwards(TransformersEngine):
    def generate(self, requests: Any, *others: Any) -> list[Rollout]:
        return super().generate(requests, *others)[::-1]


class OwnOnEachRank(TransformersEngine):
    def generate(self, requests: Any, sampling: Any, *others: Any) -> list[Rollout]:
        import torch.distributed as dist

        rollouts = super().generate(requests, sampling, *others)
        return [replace(r, logprobs=r.logprobs - dist.get_rank()) for r in rollouts]


class NoEngineAtAll:
    def __init__(self, setup: EngineSetup) -> None: ...


def wrong(name: str) -> str:
    return f"rollout.engine={__name__}:{name}"


CASES = [
    *(Case(f"{mode}_package", (*changes, *EVALUATED)) for mode, changes in MODES.items()),
    *(Case(f"{mode}_own", (*changes, *EVALUATED, OWN)) for mode, changes in MODES.items()),
    Case("sdpa", (OWN, "rollout.engine_options={attention: sdpa}")),
    Case("no such option", (OWN, "rollout.engine_options={atention: sdpa}")),
    Case("an option that it refuses", (OWN, "rollout.engine_options={attention: flash}")),
    Case("an option of the package's", ("rollout.engine_options={attention: sdpa}",)),
    Case("no such module", ("rollout.engine=nowhere:Engine",)),
    Case("no engine", (wrong("NoEngineAtAll"),)),
    Case("a method is missing", (wrong("CannotProbe"),)),
    Case("keeps its parameters", (wrong("KeepsItsParameters"),)),
    Case("too long", (wrong("TooLong"),)),
    Case("backwards", (wrong("Backwards"),)),
    Case("own on each rank", (wrong("OwnOnEachRank"),)),
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
def test_it_trains_as_the_megatron_engine_does(mode, runs):
    own, package = metrics(runs, f"{mode}_own"), metrics(runs, f"{mode}_package")
    assert len(own) == len(package) == 2
    for mine, theirs in zip(own, package):
        assert mine.keys() - theirs.keys() == {*PROBED, *ENGINES_OWN} and not theirs.keys() - mine.keys()
        assert max(mine[key] for key in (*PROBED, "rollout_logprob_gap_max")) < 1e-3
        for key, value in theirs.items():
            if (
                key in ("tokens_generated", "tokens_scored") and mode == "in_flight"
            ):  # what is sampled behind a stop is each engine's own
                assert mine[key] >= mine["tokens_kept"] == theirs["tokens_kept"]
            elif isinstance(value, float):
                assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
            else:
                assert mine[key] == value, key


def test_what_has_drifted_is_stopped_in_flight(runs):
    assert metrics(runs, "in_flight_own")[0]["ended"]["drift"] > 0


def test_its_option_reaches_it(runs):
    assert metrics(runs, "sdpa")[0]["tokens_generated"] == metrics(runs, "separate_own")[0]["tokens_generated"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("no such option", ("rollout.engine_options", "atention", "TransformersEngine takes attention")),
        ("an option that it refuses", ("rollout.engine", "attention flash must be eager or sdpa")),
        ("an option of the package's", ("rollout.engine_options", "megatron takes no options")),
        ("no such module", ("rollout.engine", "there is no module nowhere", "PYTHONPATH")),
        ("no engine", ("rollout.engine", "NoEngineAtAll is no subclass of", "RolloutEngine")),
        ("a method is missing", ("rollout.engine", "CannotProbe lacks probe")),
    ],
)
def test_what_does_not_fit_ends_the_run_before_its_first_step(name, words, runs):
    outcome = runs[1][name]
    assert outcome.exit_code == 2 and all(word in outcome.error for word in words), outcome.error


@pytest.mark.parametrize(
    "name, words",
    [
        ("keeps its parameters", ("after the hand-over the engine's log-probs differ", "holds other parameters")),
        ("too long", ("the engine's response 0 has", "tokens, not 1 to 12")),
        ("backwards", ("returned responses [3, 2, 1, 0] to requests [0, 1, 2, 3]",)),
        ("own on each rank", ("response 0 on rank 1 is not that on rank 0", "the same ones")),
    ],
)
def test_an_engine_that_breaks_its_contract_is_told_so(name, words, runs):
    outcome = runs[1][name]
    assert outcome.exit_code == 1 and all(word in outcome.error for word in words), outcome.error


def test_it_works_by_the_command_line_from_a_folder_of_ones_own(tmp_path):
    shutil.copy(HERE / "own_engine.py", tmp_path)
    rollout = {"engine": "own_engine:TransformersEngine", "engine_options": {"attention": "sdpa"}}
    run = TinyRun(tmp_path, **SHORT, rollout=rollout)
    assert run.train(PYTHONPATH=f"{tmp_path}:{HERE.parents[1]}") == 0, run.output()
    assert len(run.metrics()) == 2
