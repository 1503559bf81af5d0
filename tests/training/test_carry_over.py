"""Whole runs whose responses go on in later steps: on every scoring pass and layout, interrupted and evaluated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases

STEPS = 5
# Three run at once: they begin, and so end, in turns.
AHEAD = ("rollout.carry_over=finished", "rollout.oversubscribe=2.0", "rollout.max_version_lag=2", "rollout.max_batch=3")
SAME = ("rollout.carry_over=finished", "rollout.oversubscribe=1.0")
ALONE = ("student.parallel={}", "teacher.parallel={}")
EVALUATED = (
    "eval.every=2",
    "eval.sets=[{name: sums, prompts: FOLDER/prompts.jsonl, verifier: exact, max_tokens: 4, limit: 3}]",
)
GRPO = ("prune.preset=in_flight", "prune.after_drift=grpo", "prune.grpo_share=0.5", "data.verifier=exact")
GROUP = ("loss.kind=sampled_reverse_kl", "loss.advantage=group", "prune.preset=off")
PASSES = {
    "paper": (),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "in_flight": ("prune.preset=in_flight",),
    "fused": ("score.mode=fused", *ALONE),
    "grpo": GRPO,
    "group": GROUP,
}
ALIKE = ("paper", "in_flight", "grpo")  # also without it, with one step's worth, and resumed
TWO_RANKS = [
    *(Case(name, PASSES[name]) for name in ALIKE),
    *(Case(f"{name}_same", (*PASSES[name], *SAME)) for name in ALIKE),
    *(Case(f"{name}_ahead", (*overrides, *AHEAD)) for name, overrides in PASSES.items()),
    *(Case(f"{name}_resumed", (*PASSES[name], *AHEAD), resumes=(f"{name}_ahead", 2)) for name in ALIKE),
    Case("paper_dp2", (*ALONE, *AHEAD)),
    Case("paper_pp2", ("student.parallel={pipeline: 2}", *AHEAD)),
    Case("paper_evaluated", (*EVALUATED, *AHEAD)),
    Case("paper_weighted", ("rollout.importance_clip=2.0", *AHEAD)),
    Case("paper_off", ("train.steps=3",), resumes=("paper_ahead", 2)),
    Case("paper_later", AHEAD, resumes=("paper", 2)),
]
FOUR_RANKS = [Case("paper_tp2_pp2", ("student.parallel={tensor: 2, sequence: true, pipeline: 2}", *AHEAD))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(
        tmp_path_factory.mktemp("carry"),
        train={"steps": STEPS},
        prune={"segment": 4},
        checkpoint={"every": 2, "keep_last": 9},
    )
    run.outcomes = {}  # type: ignore[attr-defined]
    first = [case for case in TWO_RANKS if not case.resumes]
    later = [case for case in TWO_RANKS if case.resumes]
    for world, cases in ((2, first), (2, later), (1, [Case("paper_tp1", (*ALONE, *AHEAD))]), (4, FOUR_RANKS)):
        outcomes = run_distributed(world, run_cases, run.folder, cases)[0]
        assert {case.name: o.error for case, o in zip(cases, outcomes, strict=True) if o.error} == {}
        run.outcomes |= {case.name: o for case, o in zip(cases, outcomes, strict=True)}  # type: ignore[attr-defined]
    return run


def metrics(runs: TinyRun, name: str) -> list[dict[str, Any]]:
    return runs.metrics(runs.folder / name)


OWN = {
    "carried",
    "carried_tokens",
    "version_lag_mean",
    "version_lag_max",
    "responses_effective",
    "length_started",
    "length_trained",
}


@pytest.mark.parametrize("name", ALIKE)
def test_one_steps_worth_under_way_is_the_run_without_it(runs: TinyRun, name: str) -> None:
    plain, same = metrics(runs, name), metrics(runs, f"{name}_same")
    assert len(plain) == STEPS
    assert [{k: v for k, v in step.items() if k not in OWN} for step in same] == plain
    assert all(step["carried"] == step["version_lag_max"] == 0 for step in same)


@pytest.mark.parametrize("name", PASSES)
def test_every_step_trains_on_a_whole_batch_and_nothing_is_too_old(runs: TinyRun, name: str) -> None:
    steps = metrics(runs, f"{name}_ahead")
    assert [sum(step["ended"].values()) for step in steps] == [4] * STEPS
    assert max(step["version_lag_max"] for step in steps) in (1, 2) and steps[0]["version_lag_max"] == 0
    assert [step["carried"] for step in steps] == [4] * (STEPS - 1) + [0]
    assert sum(step["tokens_generated"] for step in steps) >= sum(step["tokens_kept"] for step in steps) > 0
    assert all(math.isfinite(step["loss"]) and step["response_length_mean"] > 0 for step in steps)


@pytest.mark.parametrize("name", ALIKE)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(runs: TinyRun, name: str) -> None:
    assert metrics(runs, f"{name}_resumed") == metrics(runs, f"{name}_ahead")


def test_responses_are_left_in_the_middle(runs: TinyRun) -> None:
    """Two replicas run six at once: theirs end together."""
    for name in ("paper_ahead", "in_flight_ahead", "paper_dp2"):
        steps = metrics(runs, name)
        assert [step["carried_tokens"] > 0 for step in steps[:-1]].count(True) >= 2, name
        assert any(0 < step["version_lag_mean"] < step["version_lag_max"] for step in steps), name


@pytest.mark.parametrize("name", ["paper_tp1", "paper_pp2", "paper_tp2_pp2"])
def test_other_layouts_train_on_the_same_responses(runs: TinyRun, name: str) -> None:
    for step, other in zip(metrics(runs, "paper_ahead"), metrics(runs, name), strict=True):
        for key in ("tokens_generated", "tokens_kept", "tokens_trained", "carried_tokens", "version_lag_mean", "ended"):
            assert step[key] == other[key], key
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)


def test_an_evaluation_in_between_changes_nothing(runs: TinyRun) -> None:
    steps = metrics(runs, "paper_evaluated")
    assert [step["step"] for step in steps if "accuracy" in step] == [2, 4, 5]
    assert [{k: v for k, v in step.items() if k != "accuracy"} for step in steps] == metrics(runs, "paper_ahead")


def test_tokens_of_older_versions_have_importance_weights_on_request(runs: TinyRun) -> None:
    steps = metrics(runs, "paper_weighted")
    assert steps[0]["importance_mean"] == pytest.approx(1.0, abs=1e-3)
    stale = [step for step in steps if step["version_lag_mean"] > 0]
    assert stale and max(abs(step["importance_mean"] - 1) for step in stale) > 1e-3


def test_responses_under_way_are_dropped_aloud_where_it_is_switched_off(runs: TinyRun) -> None:
    said = runs.outcomes["paper_off"].said  # type: ignore[attr-defined]
    assert "rollout.carry_over: off drops 4 responses that the checkpoint has under way" in said
    assert [step["step"] for step in metrics(runs, "paper_off")] == [1, 2, 3]


def test_it_can_be_switched_on_on_the_way(runs: TinyRun) -> None:
    assert [step.get("carried") for step in metrics(runs, "paper_later")] == [None] * 2 + [4, 4, 0]


def test_a_damaged_file_of_carried_responses_is_named(runs: TinyRun, tmp_path: Path) -> None:
    from megatron_opd.checkpoint import directory

    (newest,) = [c for c in directory.find(runs.folder / "paper_ahead" / "checkpoints") if c.step == 2]
    assert newest.problem == "" and (newest.path / directory.CARRIED).stat().st_size > 0
    file = newest.path / directory.CARRIED
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes(4) if whole[-4:] != bytes(4) else whole[:-4] + b"\1\1\1\1")
    assert directory.problem_of(newest.path) == "carried.safetensors is not the one that was saved"
    file.write_bytes(whole)
