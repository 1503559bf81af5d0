"""A run goes on from its checkpoint at the same layout bit for bit, at any other layout within rounding."""

from __future__ import annotations

import math

import pytest

from tests.distributed import run_distributed
from tests.tiny_run import Case, Outcome, TinyRun, run_cases

DATA = "student.parallel={}"
DISTRIBUTED = "train.distributed_optimizer=true"


def branch(name: str, source: str, start: int, *overrides: str) -> Case:
    """A run that makes two more steps from another one's checkpoint."""
    return Case(name, (f"train.steps={start + 2}", *overrides), resumes=(source, start))


# The reference is at TP2 with sequence parallelism, its teacher at PP2.
TWO_RANKS = [
    branch("same", "run", 2),
    branch("pp2", "run", 2, "student.parallel={pipeline: 2}", "teacher.parallel={tensor: 2, sequence: true}"),
    branch("dp2", "run", 2, DATA),
    branch("dp2_distributed", "run", 2, DATA, DISTRIBUTED),
    branch("back_to_tp2", "dp2_distributed", 4),
    branch("distributed_again", "pp2", 4, DATA, DISTRIBUTED),
]
ONE_RANK = [branch("unsharded", "run", 2, DATA, "teacher.parallel={}")]
FOUR_RANKS = [
    branch("tp2_pp2", "dp2_distributed", 4, "student.parallel={tensor: 2, sequence: true, pipeline: 2}"),
    branch("tp2_dp2_distributed", "run", 2, DISTRIBUTED),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The reference and all branches on two ranks."""
    run = TinyRun(tmp_path_factory.mktemp("layouts"), checkpoint={"every": 2, "keep_last": 9})
    _all_finish(run_distributed(2, run_cases, run.folder, [Case("run", ("train.steps=6",)), *TWO_RANKS]))
    return run


def _all_finish(outcomes: list[list[Outcome]]) -> None:
    assert [outcome.error for outcome in outcomes[0] if outcome.error] == []


def largest_difference(runs: TinyRun, branch: Case) -> float:
    """Over all numbers of both metrics, relative to their size; infinite where anything else differs."""
    assert branch.resumes
    stop = branch.resumes[1] + 2
    ours, theirs = runs.metrics(runs.folder / branch.name), runs.metrics()[:stop]
    assert [m["step"] for m in ours] == list(range(1, stop + 1))
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for key in (a.keys() | b.keys()) - {"microbatches"}:  # of one rank's pipeline: follows the layout
            x, y = a.get(key), b.get(key)
            if isinstance(x, float) and isinstance(y, float):
                worst = max(worst, abs(x - y) / max(abs(x), abs(y), 1e-3))
            elif x != y:
                return math.inf
    return worst


@pytest.mark.parametrize("branch", TWO_RANKS, ids=lambda branch: branch.name)
def test_two_ranks(runs: TinyRun, branch: Case) -> None:
    difference = largest_difference(runs, branch)
    assert difference == 0 if branch.name == "same" else difference < 1e-4


@pytest.mark.parametrize("world", [1, 4])
def test_other_numbers_of_ranks(runs: TinyRun, world: int) -> None:
    branches = {1: ONE_RANK, 4: FOUR_RANKS}[world]
    # A checkpoint is also a model directory: another run starts from it.
    checkpoint = runs.run_dir / "checkpoints/step_000006"
    new = Case("new", (f"student.model={checkpoint}", "train.steps=3", *ONE_RANK[0].overrides[1:]))
    _all_finish(run_distributed(world, run_cases, runs.folder, [*branches, new] if world == 1 else branches))
    for branch in branches:
        difference = largest_difference(runs, branch)
        assert difference < 1e-4, f"{branch.name} differs by {difference}"
    if world == 4:
        return
    started = runs.metrics(runs.folder / "new")
    assert len(started) == 3 and started[0]["loss"] < runs.metrics()[0]["loss"]  # six steps of learning ahead
