"""The published relatives of Prune-OPD in whole runs, in several layouts on real process groups: the same numbers as on
one process, and what each is known for."""

from __future__ import annotations

import pytest

from tests.distributed import run_distributed
from tests.tiny_run import Case, Outcome, TinyRun, make_model, run_cases

LAYOUTS = {
    1: {"tp1": ("student.parallel={}", "teacher.parallel={}")},
    2: {
        "tp2_pp2": (),
        "pp2_tp2": ("student.parallel={pipeline: 2}", "teacher.parallel={tensor: 2, sequence: true}"),
        "dp2": ("student.parallel={}", "teacher.parallel={}"),
    },
    4: {
        "tp4": ("student.parallel={tensor: 4}", "teacher.parallel={tensor: 2}"),
        "tp2_pp2": ("student.parallel={tensor: 2, pipeline: 2}", "teacher.parallel={}"),
    },
}
METHODS = {
    "off": ("prune.preset=off",),
    "topd": ("prune.preset=topd", "prune.budget.share=0.5"),
    "popd": ("prune.preset=popd", "prune.budget={initial: 8, minimum: 8, step: 8, patience: 1, maximum: 24}"),
    "iw": ("prune.preset=iw",),
    "tip": ("prune.preset=tip",),
    "random_window": ("prune.preset=random_window",),
    "own": (
        "prune.preset=off",
        "prune.token_weighting=tests.extending.own_weighting:FirstTokens",
        "prune.token_weighting_options={count: 5}",
    ),
    "exopd": ("prune.preset=off", "loss.kind=sampled_reverse_kl", "loss.reward_scale=1.25"),
    "exopd_in_flight": ("prune.preset=in_flight", "loss.reward_scale=1.25", "prune.segment=4"),
    "top_d": (
        "prune.preset=off",
        "loss.kind=sampled_reverse_kl",
        "loss.proximal=0.2",
        "loss.advantage=group",
        "loss.fused_head=true",
    ),
    "iw_in_flight": ("prune.preset=in_flight", "prune.token_weighting=iw", "prune.segment=4"),
}
ON_FOUR = ("topd", "exopd_in_flight", "top_d", "iw_in_flight")  # the others differ from these on the host alone
ALONE = {  # on one process
    "sampled": ("prune.preset=off", "loss.kind=sampled_reverse_kl"),
    "exopd_from_teacher": ("prune.preset=off", "loss.reward_scale=1.25", "loss.reference=FOLDER/teacher"),
    "proximal": ("prune.preset=off", "loss.proximal=0.2"),
}
SHORT = {"train": {"steps": 3, "warmup_steps": 0}, "checkpoint": {"every": 0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], list[dict]]:
    """Metrics by number of processes, layout and method."""
    run = TinyRun(tmp_path_factory.mktemp("methods"), **SHORT)
    tokenizer = run.folder / "tokenizer.model"
    make_model(run.folder / "student", tokenizer, seed=0, num_key_value_heads=4)  # four tensor ranks divide them
    make_model(run.folder / "teacher", tokenizer, seed=1, num_key_value_heads=4, hidden_size=48)
    lines = {}
    for size, layouts in LAYOUTS.items():
        cases = {
            (size, layout, method): Case(f"{size}_{layout}_{method}", (*where, *what))
            for layout, where in layouts.items()
            for method, what in (METHODS | (ALONE if size == 1 else {})).items()
            if size < 4 or method in ON_FOUR
        }
        outcomes: list[Outcome] = run_distributed(size, run_cases, run.folder, list(cases.values()))[0]
        for (key, case), outcome in zip(cases.items(), outcomes):
            assert not outcome.error, (case.name, outcome.error)
            lines[key] = run.metrics(run.folder / case.name)
    return lines


@pytest.mark.parametrize(
    "size, layout, method",
    [
        (size, layout, method)
        for size, layouts in LAYOUTS.items()
        for layout in layouts
        for method in METHODS
        if size == 2 or (size == 4 and method in ON_FOUR)
    ],
)
def test_every_layout_has_the_curve_of_one_process(size, layout, method, runs):
    whole, split = runs[1, "tp1", method], runs[size, layout, method]
    for one, other in zip(whole, split, strict=True):
        for key in ("tokens_generated", "budget", "tokens_trained", "events_mean"):
            assert other[key] == one[key], key
        for key in {"loss", "grad_norm", "token_weight_mean"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=2e-4), key


def test_topd_is_capped_for_ever_and_popd_climbs(runs):
    assert [line["budget"] for line in runs[1, "tp1", "topd"]] == [12, 12, 12]
    assert [line["budget"] for line in runs[1, "tp1", "popd"]] == [8, 16, 24]
    assert [line["budget"] for line in runs[1, "tp1", "off"]] == [24, 24, 24]


def test_iw_weighs_more_and_learns_from_the_same_tokens(runs):
    plain, weighed = runs[1, "tp1", "off"][0], runs[1, "tp1", "iw"][0]
    assert weighed["tokens_generated"] == plain["tokens_generated"] == weighed["tokens_weighted"]
    assert 1 < weighed["token_weight_mean"] < 1.5
    assert plain["loss"] < weighed["loss"] < 1.5 * plain["loss"]


@pytest.mark.parametrize("method, share", [("tip", 0.5), ("random_window", 0.25)])
def test_a_share_of_the_tokens_is_kept(method, share, runs):
    line = runs[1, "tp1", method][0]
    responses = 4
    assert (
        share * line["tokens_generated"] - responses
        <= line["tokens_weighted"]
        <= share * line["tokens_generated"] + responses
    )
    assert line["token_weight_mean"] == pytest.approx(line["tokens_weighted"] / line["tokens_generated"])
    assert line["tokens_trained"] <= line["tokens_generated"]


def test_tip_trains_on_the_tokens_with_more_to_learn(runs):
    assert runs[1, "tp1", "tip"][0]["loss"] > runs[1, "tp1", "off"][0]["loss"]


def test_a_weighting_of_ones_own(runs):
    line = runs[1, "tp1", "own"][0]
    assert line["tokens_weighted"] == line["tokens_trained"] == 4 * 5  # of four responses, nothing behind is sent on


def test_exopd_begins_with_a_multiple_of_the_teachers_reward(runs):
    """At the first step the reference is the student: A = 1.25 (log q - log p)."""
    plain, beyond = runs[1, "tp1", "sampled"], runs[1, "tp1", "exopd"]
    assert beyond[0]["loss"] == pytest.approx(1.25 * plain[0]["loss"], rel=1e-4)
    assert beyond[0]["grad_norm"] == pytest.approx(1.25 * plain[0]["grad_norm"], rel=1e-4)
    assert beyond[2]["loss"] != pytest.approx(1.25 * plain[2]["loss"], rel=1e-3)  # the reference has stayed
    assert beyond[0]["reverse_kl"] == plain[0]["reverse_kl"]  # to the teacher itself


def test_exopd_from_the_teacher_is_plain_distillation(runs):
    for one, other in zip(runs[1, "tp1", "off"], runs[1, "tp1", "exopd_from_teacher"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_proximal_teacher_asks_for_less(runs):
    plain, proximal = runs[1, "tp1", "off"][0], runs[1, "tp1", "proximal"][0]
    assert 0 < proximal["loss"] < 0.25 * plain["loss"]  # log(a r + 1 - a) > a log r, and -log(1 - a) at most
