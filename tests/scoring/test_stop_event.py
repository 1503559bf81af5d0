"""Stops as events: the published numbers, what is left alone, and a pair that unlearns to stop without them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.commands.doctor import Problem, stop_report
from megatron_opd.config import ConfigError, PruneConfig, parse_config
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.kernels import VocabShard
from megatron_opd.prune.signals import make_signal
from megatron_opd.scoring.stop_event import student_stop_logprob, weigh_stops
from megatron_opd.scoring.teacher_view import Candidates, teacher_view, to_scores
from megatron_opd.training.stop import StopPlan, resolve_stop
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores
from tests.data.make_tokenizers import make_hugging_face, make_sentencepiece
from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases

STUDENTS, TEACHERS = 2, 4  # what each model ends with
LOG = math.log


def rollout(end: str = "eos", **changes: object) -> Rollout:
    ids = torch.tensor([[5, 6], [6, 5], [STUDENTS, 5]])
    logprobs = torch.tensor([[-0.1, -3], [-0.2, -3], [LOG(0.98), LOG(0.02)]])
    given = Rollout(Prompt(0, "", [1]), 0, ids[:, 0], logprobs[:, 0], ids, logprobs, end, 0)
    return replace(given, **changes)


def scores(stop: float = LOG(0.95), measured: int = 3) -> TeacherScores:
    sampled = torch.tensor([-0.1, -0.1, LOG(1e-11)])
    return TeacherScores(
        sampled[:, None].expand(-1, 2), sampled, {}, measured, stop_logprobs=torch.tensor([-9.0, -9.0, stop])[:measured]
    )


def batch(given: Rollout, scored: TeacherScores, kept: int = 3, weight: float = 0.5) -> ScoredBatch:
    return ScoredBatch([given], [scored], [torch.full((3,), weight)], [kept], [kept], [0], 3)


def test_the_published_pair() -> None:
    """methods.md, section 0, rule 5: q(151645) = 0.95, q(151643) = 1e-11, p(151643) = 0.98."""
    scored = batch(rollout(), scores())
    weigh_stops(scored, frozenset({STUDENTS}))
    assert scored.advantage[0].tolist() == pytest.approx([0, 0, 0.5 * -0.031], abs=3e-4)
    assert scored.prune_weight[0].tolist() == [0.5, 0.5, 0.0] and scored.kept_length == [3]
    assert float(scored.scores[0].sampled_logprobs[-1] - scored.rollouts[0].logprobs[-1]) == pytest.approx(
        -25.308, abs=1e-3
    )


def test_all_terminators_of_the_student_count() -> None:
    assert student_stop_logprob(rollout(), frozenset({STUDENTS, 5})) == pytest.approx(0, abs=1e-6)
    unlisted = rollout(topk_ids=torch.tensor([[5, 6]] * 3), topk_logprobs=torch.full((3, 2), LOG(0.01)))
    assert student_stop_logprob(unlisted, frozenset({STUDENTS, 5})) == pytest.approx(LOG(0.99))


@pytest.mark.parametrize(
    ("given", "kept", "weight"),
    [
        ((rollout("length"), scores()), 3, 1.0),
        ((rollout("drift"), scores()), 3, 1.0),
        ((rollout(), scores(measured=2)), 3, 1.0),  # the teacher has not read it
        ((rollout(), scores()), 2, 1.0),  # cut before
        ((rollout(), scores()), 3, 0.0),
        ((rollout(), replace(scores(), stop_logprobs=None)), 3, 1.0),
    ],
)
def test_what_is_no_stop_or_weighs_nothing_stays(given: tuple, kept: int, weight: float) -> None:
    scored = batch(*given, kept, weight)
    weigh_stops(scored, frozenset({STUDENTS}))
    assert scored.advantage is None and scored.prune_weight[0].tolist() == [weight] * 3


@pytest.mark.parametrize("bound", [None, 20.0, 2.0])
def test_a_bound_on_the_advantage_holds_for_the_event(bound: float | None) -> None:
    scored = batch(rollout(), replace(scores(), stop_logprobs=torch.tensor([-5.0, -5.0, LOG(1e-4)])), 3, 1.0)
    own = student_stop_logprob(rollout(), frozenset({STUDENTS}))
    weigh_stops(scored, frozenset({STUDENTS}), bound)
    expected = LOG(1e-4) - own if bound != 2.0 else -2.0
    assert scored.advantage is not None and float(scored.advantage[0][2]) == pytest.approx(expected, rel=1e-5)


def test_candidates_that_are_terminators_are_compared_as_events() -> None:
    """Also where another token was sampled, so that no position before the stop unlearns it."""
    ids = torch.tensor([[5, STUDENTS, 6], [6, 5, 7], [5, STUDENTS, 7]])
    own, theirs = torch.tensor([[0.7, 0.2, 0.1]] * 3).log(), torch.tensor([[0.6, 1e-11, 0.3]] * 3).log()
    given = rollout("length", topk_ids=ids, topk_logprobs=own)
    scored = batch(given, replace(scores(), logprobs=theirs, stop_logprobs=torch.tensor([0.05, 0.5, 0.04]).log()))
    weigh_stops(scored, frozenset({STUDENTS, 7}))
    expected = theirs.clone()
    expected[0, 1] = LOG(0.05)
    expected[1, 2] = LOG(0.5)
    expected[2, 1:] = torch.tensor(
        [0.2 * 0.04 / 0.3, 0.1 * 0.04 / 0.3]
    ).log()  # two of them: shared as the student does
    torch.testing.assert_close(scored.scores[0].logprobs, expected)
    assert scored.advantage is None
    part = batch(given, replace(scores(), logprobs=theirs, stop_logprobs=torch.tensor([0.05]).log(), measured=1))
    weigh_stops(part, frozenset({STUDENTS}))
    torch.testing.assert_close(part.scores[0].logprobs[1:], theirs[1:])


@pytest.mark.parametrize("terminators", [(), (3,), (3, 7)])
def test_the_teachers_mass_on_its_terminators(terminators: tuple[int, ...]) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(15).reshape(5, 3) % 11
    asked = Candidates(ids, torch.zeros(5, 3), ids[:, 0])
    teacher = SimpleNamespace(vocab_shard=VocabShard.of(None, 11), terminators=terminators)
    fields = teacher_view(logits, asked, make_signal(PruneConfig(k=3)), teacher)
    expected = logits.softmax(-1)
    torch.testing.assert_close(fields["logprobs"], expected.gather(1, ids).log())
    torch.testing.assert_close(fields["sampled_logprobs"], expected.gather(1, ids[:, :1])[:, 0].log())
    none = torch.zeros(5)
    found = to_scores(fields, Rollout(Prompt(0, "", [1]), 0, ids[:, 0], none, ids, asked.logprobs, "eos", 0))
    if terminators:
        torch.testing.assert_close(found.stop_logprobs, expected[:, list(terminators)].sum(1).log())
    else:
        assert found.stop_logprobs is None


def test_terminators_and_the_choice(tmp_path: Path) -> None:
    base = make_hugging_face(tmp_path / "base", eos="<|endoftext|>")
    instruct = make_hugging_face(tmp_path / "instruct", eos="<|im_end|>", generation_eos=[0, 2])
    plain = make_sentencepiece(tmp_path / "plain")
    assert load_tokenizer(base).eos_ids == {0} and load_tokenizer(base).terminators == {0, 2}  # its template's
    assert load_tokenizer(instruct).terminators == {0, 2} and load_tokenizer(plain).terminators == {1}

    def plan(student: Path, teacher: Path, stop: str = "auto", mode: str = "separate"):
        models = {"student": {"model": str(student)}, "teacher": {"model": str(teacher)}}
        config = parse_config(
            {**models, "data": {"prompts": "p.jsonl"}, "loss": {"stop": stop}, "score": {"mode": mode}}
        )
        return resolve_stop(config, load_tokenizer(student))

    assert not plan(instruct, instruct).event and plan(instruct, instruct).note == ""
    told = plan(base, instruct)
    assert told.event and (told.student, told.teacher) == ({0}, {0, 2})
    assert told.note.startswith("loss.stop: event (student stops on [0], teacher on [0, 2])")
    assert "chat template ends turns with [2], on which nothing stops" in told.note
    for asked in ({"stop": "token"}, {"mode": "fused"}):
        told = plan(base, instruct, **asked)
        assert not told.event and "may be punished for its token" in told.note
    assert plan(instruct, instruct, stop="event").event
    with pytest.raises(ConfigError, match="loss.stop: event needs the scores before training"):
        plan(base, instruct, stop="event", mode="fused")


IN_FLIGHT = ("prune.preset=in_flight", "prune.w_drop=0.01", "prune.segment=3", "prune.budget.minimum=8")
WAYS = {
    "separate": (),
    "fused head": ("loss.fused_head=true", "loss.chunk_tokens=16"),
    "in flight": IN_FLIGHT,
    "until spent": (*IN_FLIGHT, "prune.in_flight=false"),
    "hidden": ("score.payload=hidden", "loss.kind=full_reverse_kl"),
}


def teach(folder: Path, terminator: int) -> None:
    """Teaches a tiny model to say three or four tokens and to end with this one."""
    torch.manual_seed(terminator)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        rows = []
        for i in range(8):
            prompt = tokenizer.encode(f"{(step + i) % 40} + {(step + i) % 40 + 1} = ", start=True)[:9]
            rows.append([*prompt, *[10] * (12 - len(prompt)), terminator])
        ids = torch.tensor(rows)
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[:, 7:].flatten(0, 1), ids[:, 8:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": terminator}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher that stop alike, on two tokens; trained with a stop as a token and as an event."""
    run = TinyRun(
        tmp_path_factory.mktemp("pair"),
        prune={"preset": "off", "k": 8, "budget": {"initial": 8, "minimum": 8, "maximum": 8}},
        train={"steps": 40, "prompts_per_step": 8, "responses_per_prompt": 2, "lr": 1e-3, "warmup_steps": 0},
        checkpoint={"every": 0},
    )
    teach(run.folder / "student", 3)
    teach(run.folder / "teacher", 5)
    kinds = (("topk_reverse_kl", 1e-3), ("sampled_reverse_kl", 3e-3))
    cases = [
        Case(f"{stop}-{kind}", (f"loss.stop={stop}", f"loss.kind={kind}", f"train.lr={lr}"))
        for kind, lr in kinds
        for stop in ("token", "auto")
    ]
    ways = [Case(name, ("train.steps=2", "loss.stop=event", *own)) for name, own in WAYS.items()]
    whole = [replace(case, overrides=(*case.overrides, "student.parallel={}", "teacher.parallel={}")) for case in cases]
    for world, group in ((1, whole), (2, ways)):  # the long runs where nothing is sent
        for outcomes in run_distributed(world, run_cases, run.folder, group):
            assert [o.error for o in outcomes] == [""] * len(group)
    return run.folder


@pytest.mark.parametrize("kind", ["topk_reverse_kl", "sampled_reverse_kl"])
def test_a_pair_with_two_terminators_goes_on_stopping(pair: Path, kind: str) -> None:
    def truncated(stop: str) -> list[float]:
        lines = (pair / f"{stop}-{kind}" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["ended"]["length"] / 16 for line in lines]

    token, event = truncated("token"), truncated("auto")
    assert token[0] == event[0] < 0.3
    assert sum(token[-10:]) / 10 > 0.9 and sum(event[-10:]) / 10 < 0.2, (token, event)


def test_alarms_tell_a_stop_that_is_unlearnt(pair: Path) -> None:
    def alarms(run: str) -> list[list[str]]:
        return [json.loads(line)["alarms"] for line in (pair / run / "metrics.jsonl").read_text().splitlines()]

    token = alarms("token-topk_reverse_kl")
    assert token[1] == [] and "stop_suppressed" in token[2] and {"stop_suppressed", "truncation"} <= set(token[-1])
    assert alarms("auto-topk_reverse_kl") == [[]] * 40


def test_every_way_of_scoring_takes_the_event(pair: Path) -> None:
    """None of these responses drifts far enough to be cut: all ways train on the same."""
    first = {}
    for name in WAYS:
        lines = [json.loads(line) for line in (pair / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and lines[0]["ended"]["eos"] == 16 and math.isfinite(lines[1]["loss"])
        first[name] = lines[0]
    assert first["fused head"]["loss"] == pytest.approx(first["separate"]["loss"], rel=1e-4)
    assert first["fused head"]["grad_norm"] == pytest.approx(first["separate"]["grad_norm"], rel=1e-4)
    assert first["until spent"]["loss"] == pytest.approx(first["in flight"]["loss"], rel=1e-4)


def test_the_doctor_says_what_a_stop_is_worth() -> None:
    token = StopPlan(False, frozenset({STUDENTS}), {"teacher": frozenset({TEACHERS})}, "loss.stop: token")
    with pytest.raises(Problem, match="every stop will be punished by 25.3 nats until responses run into their budget"):
        stop_report([rollout()], [scores()], token, "1 of 1 responses stopped")
    event = replace(token, event=True)
    said = stop_report([rollout()], [scores()], event, "1 of 1 responses stopped")
    assert "token -0.02, -25.33, event -0.02, -0.05; stopping is pushed by -0.03 nats" in said
    assert "the teacher would go on here" in stop_report([rollout()], [scores(-9.0)], event, "")
