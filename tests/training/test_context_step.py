"""Context parallelism in training: whole steps against tests/reference_step.py, and runs against the same runs without.

Steps, tolerances and references are those of tests/training/test_step.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.models.tiny_families import make
from tests.reference_step import Result, run
from tests.tiny_run import Case as Run
from tests.tiny_run import TinyRun, run_cases
from tests.training.test_step import CUT, LIVE, PAPER, Case, answers, megatron_steps

# Student's layout and teacher's, in a world of four.
CASES = {
    "cp2": Case("cp2", "pp2", tokens=4096, settings=PAPER),
    "cp2 distributed optimizer": Case("cp2", "cp2_tp2_sp", tokens=60, settings=PAPER, distributed_optimizer=True),
    "cp4 cut": Case("cp4", "cp4", settings=CUT, cut="reliability"),
    "cp4 two answers": Case("cp4", "tp1", settings=PAPER, answers=2),
    "cp2 tp2 recomputed": Case("cp2_tp2", "cp2_pp2", settings=PAPER, tokens=64, recompute="full"),
    "cp2 tp2 sp cut": Case("cp2_tp2_sp", "cp2", settings=CUT, cut="reliability", recompute="selective"),
    "cp2 pp2 tied": Case("cp2_pp2", "tp2_sp", model="qwen3_tied", settings=PAPER, distributed_optimizer=True),
    "cp2 vpp2 qwen2": Case("cp2_vpp2", "tp1", model="qwen2", settings=PAPER, tokens=64),
    "cp2 tp2 sp experts": Case("cp2_tp2_sp", "cp2", model="qwen3_moe", settings=PAPER, tokens=64),
    "tp2 under a teacher at cp2": Case("tp2_sp", "cp2_tp2", settings=PAPER),
    "fused head cp2 tp2 sp": Case("cp2_tp2_sp", "cp2", settings=PAPER, tokens=64, fused_head=True),
    "fused cp2": Case("cp2", "cp2", settings=LIVE, scoring="fused", tokens=64),
    "fused cp4 sampled": Case("cp4", "cp4", settings=replace(LIVE, kind="sampled_reverse_kl"), scoring="fused"),
    "fused cp2 tp2 sp full": Case(
        "cp2_tp2_sp", "cp2_tp2_sp", settings=replace(LIVE, kind="full_reverse_kl"), scoring="fused", tokens=64
    ),
    "fused cp2 pp2": Case("cp2_pp2", "cp2_pp2", model="qwen3_tied", settings=LIVE, scoring="fused"),
}


def all_cases(rank: int, world: int, references: dict[str, Result], directories: dict[str, str]):
    return {name: megatron_steps(case, references[name], directories) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    directories = {family: str(make(family, root / family)) for family in ("qwen3", "qwen3_tied", "qwen2", "qwen3_moe")}
    directories["teacher"] = str(
        make("qwen3", root / "teacher", hidden_size=48, num_hidden_layers=2, intermediate_size=80)
    )
    done: dict[tuple, Result] = {}
    references = {}
    for name, case in CASES.items():
        key = (case.model, case.answers, str(case.settings))
        if key not in done:
            done[key] = run(directories[case.model], directories["teacher"], answers(case.answers), case.settings)
        references[name] = done[key]
    return run_distributed(4, all_cases, references, directories), references


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_reference(name, steps):
    results, references = steps
    expected, case = references[name], CASES[name]
    for found in (r[name] for r in results):
        assert found["applied"] == [True] * case.settings.steps
        assert found["effective"] == expected.effective_length
        assert found["losses"] == pytest.approx(expected.losses, rel=1e-4)
        assert found["grad_norms"] == pytest.approx(expected.grad_norms, rel=1e-4)
        for mine, theirs in zip(found["overlap"], expected.overlap):
            judged = ~mine.isnan() if case.cut == "reliability" else slice(None)
            torch.testing.assert_close(mine[judged], theirs[judged])
        if case.scoring == "fused":
            for mine, p, q in zip(found["reverse_kl"], expected.candidate_logprobs, expected.teacher_logprobs):
                torch.testing.assert_close(mine, (p.softmax(-1) * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
        assert set(found["parameters"]) <= set(expected.parameters)
        for parameter, value in found["parameters"].items():
            theirs = expected.parameters[parameter]
            assert float((value - theirs).norm() / theirs.norm()) < 2e-5, parameter


def test_microbatches_are_counted_over_the_ranks_of_a_row(steps):
    assert steps[0][0]["cp2"]["microbatches"] == 1
    assert steps[0][0]["cp2 vpp2 qwen2"]["microbatches"] % 2 == 0


ONE, TWO = "student.parallel={}", "student.parallel={context: 2}"
TEACHER_TWO = "teacher.parallel={context: 2}"
DISTRIBUTED = "train.distributed_optimizer=true"
CLIPPED = "rollout.importance_clip=2.0"  # measures the gap between rollout and student log-probs, too
FUSED = ("score.mode=fused", "teacher.parallel={}", "loss.kind=full_reverse_kl")
FUSED_TWO = ("score.mode=fused", TEACHER_TWO, "loss.kind=full_reverse_kl")
FLIGHT = ("prune.preset=in_flight", "prune.w_drop=0.2", "prune.segment=4")
# Two ranks: a run at context 2 (or one that goes on from another's checkpoint) and the run whose metrics it must have.
RUNS = [
    (Run("one", (ONE, CLIPPED)), None),
    (Run("two", (TWO, TEACHER_TWO, CLIPPED)), "one"),
    (Run("two under pp2", (TWO, CLIPPED, DISTRIBUTED)), "one"),
    (Run("two to one", (ONE, CLIPPED), resumes=("two", 2)), "one"),
    (Run("one to two", (TWO, CLIPPED, DISTRIBUTED), resumes=("one", 2)), "one"),
    (Run("distributed to one", (ONE, CLIPPED), resumes=("two under pp2", 2)), "one"),
    (Run("flight one", (ONE, *FLIGHT)), None),
    (Run("flight two", (TWO, TEACHER_TWO, *FLIGHT)), "flight one"),
    (Run("fused one", (ONE, *FUSED)), None),
    (Run("fused two", (TWO, *FUSED_TWO)), "fused one"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> TinyRun:
    made = TinyRun(tmp_path_factory.mktemp("runs"), checkpoint={"every": 2, "keep_last": 9})
    outcomes = run_distributed(2, run_cases, made.folder, [case for case, _ in RUNS])
    assert [outcome.error for outcome in outcomes[0]] == [""] * len(RUNS)
    return made


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Over all numbers, relative to their size (gaps of log-probs are rounding: below 0.01 it is absolute); infinite
    where anything else differs."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for key in (a.keys() | b.keys()) - {"microbatches"}:  # of one rank's pipeline: follows the layout
            x, y = a.get(key), b.get(key)
            if isinstance(x, float) and isinstance(y, float):
                worst = max(worst, abs(x - y) / max(abs(x), abs(y), 1e-2))
            elif x != y:
                return math.inf
    return worst


@pytest.mark.parametrize("name, other", [(case.name, other) for case, other in RUNS if other])
def test_a_run_has_the_metrics_of_context_one(name, other, runs):
    ours, theirs = runs.metrics(runs.folder / name), runs.metrics(runs.folder / other)
    assert len(ours) == 4
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["two", "two under pp2"])  # without and with a distributed optimizer
def test_one_replica_writes_each_tensor(name, runs):
    def stored(run: str) -> int:
        return sum(file.stat().st_size for file in (runs.folder / run / "checkpoints/step_000004").rglob("*.distcp"))

    assert stored(name) == pytest.approx(stored("one"), rel=0.1)  # beside a header for each tensor's piece
