"""Whole runs with two teachers: every scoring pass and layout against runs of one teacher, weighted and interrupted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, make_model, run_cases

STEPS = 3


def second(model: str, parallel: str = "{}", **more: str) -> str:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    settings = f"model: FOLDER/{model}, precision: fp32, parallel: {parallel}{rest}"
    return f"teachers=[{{name: second, sources: [odd], {settings}}}]"


ROUTED = second("second", "{tensor: 2}")
BOTH_FIRST = second("teacher", "{pipeline: 2}")
BOTH_SECOND = ("teacher.model=FOLDER/second", second("second", "{tensor: 2}"))
PASSES = {
    "paper": (),
    "until_spent": ("prune.cut=reliability", "prune.w_base=0"),
    "grpo": ("prune.preset=in_flight", "prune.after_drift=grpo", "prune.grpo_share=0.5", "data.verifier=exact"),
}
IN_FLIGHT = ("prune.preset=in_flight",)
OFF = ("prune.preset=off", ROUTED)
SHARES = "loss.teacher_shares={teacher: 1, second: 3}"
CARRY = ("rollout.carry_over=finished", "rollout.oversubscribe=1.5", "rollout.max_version_lag=2")
ALL = (*IN_FLIGHT, ROUTED, SHARES, "loss.disagreement=1", "loss.advantage_clip=5", "loss.mean=sequence")
ONE_RANK = ("student.parallel={}", "teacher.parallel={}", second("second"))
TWO_RANKS = [
    *(Case(name, (*overrides, ROUTED)) for name, overrides in PASSES.items()),
    *(Case(f"{name}_one", overrides) for name, overrides in PASSES.items()),
    *(Case(f"{name}_first", (*overrides, BOTH_FIRST)) for name, overrides in PASSES.items()),
    *(Case(f"{name}_second", (*overrides, *BOTH_SECOND)) for name, overrides in PASSES.items()),
    Case("in_flight", (*IN_FLIGHT, ROUTED)),
    Case("off", OFF),
    Case("shares", (*OFF, SHARES)),
    Case("clipped", (*OFF, "loss.advantage_clip=0.01")),
    Case("all", ALL),
    Case("carried", (*ALL, *CARRY)),
    Case("dp2", ("student.parallel={}", "teacher.parallel={}", second("second"))),
    Case("stranger", (second("second").replace("odd", "oddd"),)),
    Case("other_tokens", (second("small"),)),
    Case("system", (second("second", system="Be kind."),)),
]
LATER = [
    Case(f"{name}_resumed", dict((c.name, c.overrides) for c in TWO_RANKS)[name], resumes=(name, 1))
    for name in ("all", "carried")
]
FOUR = "student.parallel={tensor: 2, sequence: true, pipeline: 2}"
FOUR_RANKS = [
    Case("tp4", (FOUR, "teacher.parallel={pipeline: 2}", second("second", "{tensor: 4, sequence: true}"))),
    Case("in_flight_tp4", (*IN_FLIGHT, FOUR, second("second", "{tensor: 2, pipeline: 2}"))),
]
REFUSED = ("stranger", "other_tokens", "system")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(
        tmp_path_factory.mktemp("teachers"),
        train={"steps": STEPS, "prompts_per_step": 4},
        prune={"segment": 4},
        data={"source_key": "source", "shuffle": False},  # each step has both sources
        checkpoint={"every": 1, "keep_last": 9},
    )
    tokenizer = run.folder / "tokenizer.model"
    make_model(run.folder / "second", tokenizer, seed=2, hidden_size=64, num_key_value_heads=4)
    make_model(run.folder / "small", tokenizer, seed=2, vocab_size=20)
    lines = [json.loads(line) for line in (run.folder / "prompts.jsonl").read_text().splitlines()]
    sourced = [json.dumps({**line, "source": "odd" if i % 2 else "even"}) for i, line in enumerate(lines)]
    (run.folder / "prompts.jsonl").write_text("\n".join(sourced) + "\n")
    run.outcomes = {}  # type: ignore[attr-defined]
    plain = [Case("tp1", ONE_RANK), Case("in_flight_tp1", (*IN_FLIGHT, *ONE_RANK))]
    for world, cases in ((2, TWO_RANKS), (2, LATER), (1, plain), (4, FOUR_RANKS)):
        outcomes = run_distributed(world, run_cases, run.folder, cases)[0]
        failed = {c.name: o.error for c, o in zip(cases, outcomes, strict=True) if o.error and c.name not in REFUSED}
        assert failed == {}
        run.outcomes |= {case.name: o for case, o in zip(cases, outcomes, strict=True)}  # type: ignore[attr-defined]
    return run


def metrics(runs: TinyRun, name: str) -> list[dict[str, Any]]:
    return runs.metrics(runs.folder / name)


def alike(ours: Any, theirs: Any, rel: float = 1e-4) -> None:
    """Numbers within rounding, everything else the same."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            alike(ours[key], theirs[key], rel)
    elif isinstance(ours, float) and theirs is not None:
        assert ours == pytest.approx(theirs, rel=rel, abs=1e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", PASSES)
def test_one_model_under_two_names_is_the_run_with_one_teacher(runs: TinyRun, name: str) -> None:
    """The same rows in other micro-batches of scoring: equal but for rounding."""
    plain, split = metrics(runs, f"{name}_one"), metrics(runs, f"{name}_first")
    assert "teachers" not in plain[0] and len(plain) == STEPS
    for one, two in zip(plain, split, strict=True):
        assert two.pop("teachers").keys() == {"teacher", "second"}
        for loose in ("alarms", "rollout_logprob_gap_mean", "rollout_logprob_gap_max", "rollout_mismatch"):
            one.pop(loose, None), two.pop(loose, None)
        alike(two, one, 1e-3)


@pytest.mark.parametrize("name", PASSES)
def test_each_teacher_judges_the_prompts_of_its_sources_and_no_others(runs: TinyRun, name: str) -> None:
    """Before the first update the responses are the same whoever judges: each half has the numbers of the run in which
    this teacher judges both halves."""
    routed, first, other = (metrics(runs, f"{name}{run}")[0]["teachers"] for run in ("", "_first", "_second"))
    alike(routed["teacher"], first["teacher"])
    alike(routed["second"], other["second"])
    assert routed["second"]["reverse_kl"] != pytest.approx(first["second"]["reverse_kl"], rel=1e-3)
    assert routed["teacher"]["reverse_kl"] != pytest.approx(other["teacher"]["reverse_kl"], rel=1e-3)
    assert sum(numbers["responses"] for numbers in routed.values()) == 8


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dp2", "paper"),
        ("tp1", "paper"),
        ("tp4", "paper"),
        ("in_flight_tp1", "in_flight"),
        ("in_flight_tp4", "in_flight"),
    ],
)
def test_layouts_agree(runs: TinyRun, name: str, reference: str) -> None:
    for step, other in zip(metrics(runs, name), metrics(runs, reference), strict=True):
        for key in ("loss", "tokens_generated", "tokens_trained", "events_mean", "budget", "ended"):
            alike(step[key], other[key], 1e-3)
        alike(step["teachers"], other["teachers"], 1e-3)


def test_shares_weigh_the_teachers_tokens(runs: TinyRun) -> None:
    """At the first step, where engine and trainer have the same parameters, the loss is the mean reverse KL."""
    plain, weighed = metrics(runs, "off")[0], metrics(runs, "shares")[0]
    kl = {name: numbers["reverse_kl"] for name, numbers in weighed["teachers"].items()}
    tokens = {name: numbers["tokens"] for name, numbers in weighed["teachers"].items()}
    whole = sum(tokens.values())
    assert plain["loss"] == pytest.approx(sum(kl[n] * tokens[n] / whole for n in kl), rel=1e-4)
    assert weighed["loss"] == pytest.approx(0.25 * kl["teacher"] + 0.75 * kl["second"], rel=1e-4)
    for name, share in (("teacher", 0.25), ("second", 0.75)):
        assert weighed["teachers"][name]["weight"] == pytest.approx(share * whole / tokens[name])
        assert plain["teachers"][name]["weight"] == 1


def test_a_clip_bounds_what_a_token_can_teach(runs: TinyRun) -> None:
    clipped = metrics(runs, "clipped")[0]
    assert clipped["teachers"] == metrics(runs, "off")[0]["teachers"]  # the numbers are of what the teachers say
    assert abs(clipped["loss"]) < 0.0101 < metrics(runs, "off")[0]["loss"]


@pytest.mark.parametrize("name", ["all", "carried"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(runs: TinyRun, name: str) -> None:
    whole = metrics(runs, name)
    assert metrics(runs, f"{name}_resumed") == whole
    assert all(math.isfinite(step["loss"]) for step in whole)
    weights = [step["teachers"]["second"]["weight"] for step in whole]
    assert len(set(weights)) == STEPS


def test_what_cannot_work_is_refused_before_models_are_loaded(runs: TinyRun) -> None:
    outcomes = runs.outcomes  # type: ignore[attr-defined]
    assert all(outcomes[name].exit_code == 2 for name in REFUSED)
    assert "teachers[second].sources: no prompt of" in outcomes["stranger"].error
    assert "they are from 'even', 'odd'" in outcomes["stranger"].error
    assert "small" in outcomes["other_tokens"].error and "embeds only" in outcomes["other_tokens"].error
    assert "teachers[second].system: needs messages" in outcomes["system"].error
