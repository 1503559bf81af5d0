"""score.payload: hidden in whole runs: the numbers of fused scoring, in layouts that fused scoring cannot have, in
flight and cut, and what it refuses."""

from __future__ import annotations

import pytest

from megatron_opd.config import parse_config
from megatron_opd.errors import ConfigError
from tests.distributed import run_distributed
from tests.tiny_run import Case, Outcome, TinyRun, make_model, run_cases

ONE = ("student.parallel={}", "teacher.parallel={}")
LAYOUTS = {
    1: {"one": ONE},
    2: {
        "tp2_pp2": (),  # the student at TP2 with sequence parallelism, the teacher at PP2
        "pp2_tp2": ("student.parallel={pipeline: 2}", "teacher.parallel={tensor: 2, sequence: true}"),
        "dp2": ONE,
        "cp2": ("student.parallel={context: 2}", "teacher.parallel={}"),
    },
    4: {
        "tp4_tp2": ("student.parallel={tensor: 4, sequence: true}", "teacher.parallel={tensor: 2, pipeline: 2}"),
        "tp2pp2_tp4": ("student.parallel={tensor: 2, pipeline: 2}", "teacher.parallel={tensor: 4}"),
    },
}
LOSSES = ("full_reverse_kl", "forward_kl", "generalized_jsd")
HIDDEN = ("score.payload=hidden", "loss.chunk_tokens=7")
IN_FLIGHT = ("prune.preset=in_flight", "prune.w_drop=0.2", "prune.segment=4")
CUT = ("prune.cut=reliability", "prune.w_base=0", "prune.w_drop=0.2", "prune.segment=4")
SHORT = {"train": {"steps": 2, "warmup_steps": 0}, "checkpoint": {"every": 0}}
KEYS = ("loss", "grad_norm", "reverse_kl", "overlap_mean", "tokens_generated", "effective_length_mean")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], list[dict]]:
    """Metrics by number of processes, layout, and what was run."""
    run = TinyRun(tmp_path_factory.mktemp("hidden"), **SHORT)
    tokenizer = run.folder / "tokenizer.model"
    make_model(run.folder / "student", tokenizer, seed=0, num_key_value_heads=4)  # four tensor ranks divide them
    make_model(run.folder / "teacher", tokenizer, seed=1, num_key_value_heads=4, hidden_size=48)
    lines = {}
    for size, layouts in LAYOUTS.items():
        cases = {}
        for layout, where in layouts.items():
            for loss in LOSSES if layout in ("one", "tp2_pp2") else LOSSES[:1]:
                cases[size, layout, loss] = (*where, *HIDDEN, f"loss.kind={loss}")
            cases[size, layout, "in_flight"] = (*where, *HIDDEN, *IN_FLIGHT, "loss.kind=full_reverse_kl")
            cases[size, layout, "cut"] = (*where, *HIDDEN, *CUT, "loss.kind=full_reverse_kl")
        if size == 1:
            for loss in LOSSES:
                cases[1, "one", f"fused_{loss}"] = (*ONE, "score.mode=fused", f"loss.kind={loss}")
        named = [Case("_".join(map(str, key)), overrides) for key, overrides in cases.items()]
        outcomes: list[Outcome] = run_distributed(size, run_cases, run.folder, named)[0]
        for key, case, outcome in zip(cases, named, outcomes):
            assert not outcome.error, (case.name, outcome.error)
            lines[key] = run.metrics(run.folder / case.name)
    return lines


def same(one: list[dict], other: list[dict]) -> None:
    for a, b in zip(one, other, strict=True):
        for key in KEYS:
            assert b[key] == pytest.approx(a[key], rel=2e-4), key


@pytest.mark.parametrize("loss", LOSSES)
def test_one_process_has_the_numbers_of_fused_scoring(loss, runs):
    same(runs[1, "one", f"fused_{loss}"], runs[1, "one", loss])


@pytest.mark.parametrize("what", [LOSSES[0], "in_flight", "cut"])
@pytest.mark.parametrize("size, layout", [(n, name) for n, names in LAYOUTS.items() for name in names if n > 1])
def test_any_two_layouts_have_the_numbers_of_one_process(size, layout, what, runs):
    same(runs[1, "one", what], runs[size, layout, what])


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_every_loss_has_the_numbers_of_one_process(loss, runs):
    same(runs[1, "one", loss], runs[2, "tp2_pp2", loss])


def test_in_flight_and_cut_train_on_less_than_was_generated_or_stop(runs):
    assert sum(line["ended"]["drift"] for line in runs[1, "one", "in_flight"]) > 0
    assert any(line["tokens_trained"] < line["tokens_generated"] for line in runs[1, "one", "cut"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"kind": "forward_kl"}}, "set score.mode: fused, or score.payload: hidden"),
        ({"score": {"payload": "hidden"}}, "set score.payload: topk"),
        (
            {"loss": {"kind": "forward_kl"}, "score": {"mode": "fused", "payload": "hidden"}},
            "score.mode: fused has the teacher's logits and sends nothing",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "c.jsonl"}}
    with pytest.raises(ConfigError, match=words):
        parse_config({**models, **changes})
