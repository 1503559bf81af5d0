"""The teacher's passes against transformers, judging, and pruning in flight, on several layouts."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import Config, ConfigError, PruneConfig, parse_config
from megatron_opd.models.cached import GIB, CachedForward, block_bytes
from megatron_opd.models.paged import BLOCK
from megatron_opd.prune.signals import make_signal
from megatron_opd.rollout.base import Request, Sampling, Segment
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.scoring.drift_watch import DriftWatch
from megatron_opd.scoring.factory import make_scoring
from megatron_opd.scoring.prune_weights import assign_prune_weights
from megatron_opd.scoring.segments import SegmentScorer
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.teacher_view import to_scores
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.training.setup import Trainer, build_optimizer, build_scheduler, wrap_ddp
from megatron_opd.training.step import TrainingStep
from megatron_opd.types import Prompt, Rollout, TeacherScores
from tests import reference, reference_step
from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, student_model, teacher_model
from tests.models.tiny_families import VOCAB, make

TEACHERS = ("tp1", "tp2_sp", "pp2", "tp2_sp_pp2")  # in a world of four
K = 8
TOP_P = 0.3
BUDGET = 24
# Student's layout, teacher's layout: of the runs in which generation, scoring and training work together.
PAIRS = [("tp2_sp", "pp2"), ("pp2", "tp1"), ("tp1", "tp2_sp_pp2")]
FIRES = {"threshold": 0.2, "w_drop": 0.25, "w_base": 0.0, "cut": "reliability", "segment": 5}


class NoClock:
    @contextmanager
    def phase(self, name):
        yield


def answers() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(n), draw(m)) for n, m in ((3, 20), (1, 1), (9, 2), (4, 33), (2, 17), (12, 8), (5, 29))]


def as_rollouts(known: reference_step.Result) -> list[Rollout]:
    return [
        Rollout(
            Prompt(i, "", p),
            i,
            torch.tensor(y),
            known.sampled_logprobs[i],
            known.candidates[i],
            known.candidate_logprobs[i],
            "length",
            0,
        )
        for i, (p, y) in enumerate(answers())
    ]


def of_another_prompt(rollouts: list[Rollout]) -> list[Rollout]:
    """The student's prompts are others, of other lengths; the teacher reads the known ones."""
    return [
        replace(r, prompt=Prompt(r.prompt.uid, "", [7] * (1 + 3 * i), own_teacher_tokens=r.prompt.tokens))
        for i, r in enumerate(rollouts)
    ]


def in_segments(scorer: SegmentScorer, rollouts: list[Rollout], seed: int) -> list[TeacherScores]:
    """Feeds random pieces of random answers, one round after the other."""
    rng = random.Random(seed)
    at, found = dict.fromkeys(range(len(rollouts)), 0), {i: [] for i in range(len(rollouts))}
    while any(at[i] < len(r) for i, r in enumerate(rollouts)):
        segments = []
        for i, r in enumerate(rollouts):
            if at[i] < len(r) and rng.random() < 0.6:
                end = min(len(r), at[i] + rng.randint(1, 12))
                part = slice(at[i], end)
                segments.append(
                    Segment(
                        Request(r.prompt, r.index),
                        at[i],
                        r.tokens[part],
                        r.topk_ids[part],
                        r.topk_logprobs[part],
                        end == len(r),
                    )
                )
                at[i] = end
        for i, view in scorer.score(segments).items():
            found[i].append(view)
    return [to_scores({n: torch.cat([p[n] for p in found[i]]) for n in found[i][0]}, r) for i, r in enumerate(rollouts)]


def teacher_passes(rank: int, directories: dict[str, str], known: reference_step.Result):
    rollouts, found = as_rollouts(known), {}
    with student_model(directories["student"], "tp1"):
        for layout in TEACHERS:
            teacher = teacher_model(directories["teacher"], layout)
            for name in ("overlap", "teacher_top_p"):
                signal = make_signal(PruneConfig(signal=name, k=K, teacher_top_p=TOP_P))
                found[layout, name, "separate"] = score_rollouts(teacher, rollouts, signal, 60)
                scorer = SegmentScorer(teacher, signal, 60, slots=len(rollouts))
                found[layout, name, "segments"] = in_segments(scorer, rollouts, seed=4)
                longest = max(len(r.prompt.teacher_tokens) + len(r) for r in rollouts)
                teacher.cache_gib = (-(-longest // BLOCK) + 0.5) * block_bytes(teacher) / GIB  # one response's
                bounded = SegmentScorer(teacher, signal, 60, slots=len(rollouts))
                found[layout, name, "bounded"] = in_segments(bounded, rollouts, seed=4)
                assert bounded.forward.cache.blocks <= -(-longest // BLOCK)
                teacher.cache_gib = None
                assert scorer._slot == scorer._cached == scorer._last == {}  # every response has left
            signal = make_signal(PruneConfig(signal="overlap", k=K))
            found[layout, "own prompts", "separate"] = score_rollouts(teacher, of_another_prompt(rollouts), signal, 60)
            scorer = SegmentScorer(teacher, signal, 60, slots=len(rollouts))
            found[layout, "own prompts", "segments"] = in_segments(scorer, of_another_prompt(rollouts), seed=5)
    return found


def config_of(directories: dict[str, str], student: str, teacher: str, prune: dict) -> Config:
    return parse_config(
        {
            "student": {"model": directories["student"], "precision": "fp32", "parallel": LAYOUTS[student]},
            "teacher": {"model": directories["teacher"], "precision": "fp32", "parallel": LAYOUTS[teacher]},
            "prune": {"k": K, **prune},
            "train": {"tokens_per_microbatch": 64},
            "data": {"prompts": "none.jsonl"},
        }
    )


def requests() -> list[Request]:
    return [Request(Prompt(i // 2, "", [5 + i // 2, 17, 3]), i) for i in range(8)]


def together(rank: int, directories: dict[str, str]):
    """Rollouts, batches and losses with pruning off, in flight that never fires, afterwards, and in flight."""
    sampling = Sampling(BUDGET, seed=9, top_logprobs=K)
    found = {}
    for student_layout, teacher_layout in PAIRS:
        with student_model(directories["student"], student_layout) as student:
            teacher = teacher_model(directories["teacher"], teacher_layout)
            engine = MegatronEngine(student, {11, 40}, max_batch=3)
            configs = {
                "off": config_of(directories, student_layout, teacher_layout, {"preset": "off"}),
                "never": config_of(
                    directories, student_layout, teacher_layout, {**FIRES, "threshold": 0.0, "preset": "in_flight"}
                ),
                "whole": config_of(
                    directories, student_layout, teacher_layout, {**FIRES, "preset": "paper", "cut": "none"}
                ),
                "after": config_of(directories, student_layout, teacher_layout, {**FIRES, "preset": "paper"}),
                "in flight": config_of(directories, student_layout, teacher_layout, {**FIRES, "preset": "in_flight"}),
            }
            pair = {}
            for name, config in configs.items():
                scoring = make_scoring(config, engine, Teachers({"teacher": teacher}, {}))
                rollouts, scores = scoring.generate_and_score(requests(), sampling, NoClock())
                pair[name] = assign_prune_weights(rollouts, scores, config.prune, scoring.signal)
            pair["fed"] = fed_tokens(engine, teacher, sampling, configs["in flight"])
            ddp = wrap_ddp(student, configs["off"].train)
            optimizer = build_optimizer(student, ddp, configs["off"].train)
            trainer = Trainer(
                student, {"teacher": teacher}, ddp, optimizer, build_scheduler(optimizer, configs["off"].train)
            )
            with torch.no_grad():  # the same parameters for both
                before = [p.clone() for p in ddp[0].parameters()]
            for name in ("off", "never"):
                for p, value in zip(ddp[0].parameters(), before):
                    p.data.copy_(value)
                result = TrainingStep(trainer, configs[name])(pair[name])
                pair[f"{name} step"] = (result.loss, result.grad_norm, result.applied)
            found[student_layout, teacher_layout] = pair
    return found


def fed_tokens(engine: MegatronEngine, teacher, sampling: Sampling, config: Config) -> tuple[int, int]:
    """Tokens that the teacher was fed by all replicas, and those that it had to be fed."""
    counted, plain = [0], CachedForward.prefill

    def counting(self, tokens, *args):
        counted[0] += tokens.numel() if self.model is teacher else 0
        return plain(self, tokens, *args)

    CachedForward.prefill = counting
    try:
        watch = DriftWatch(teacher, make_signal(config.prune), config.prune, 64, 8, NoClock(), set())
        engine.generate(requests(), sampling, watch, config.prune.segment)
    finally:
        CachedForward.prefill = plain
    total = torch.tensor(counted[0] if teacher.layout.owns_results else 0)
    dist.all_reduce(total)
    judged = {i: sum(v["sampled_logprobs"].numel() for v in views) for i, views in watch.views.items()}
    return int(total), sum(len(r.prompt.tokens) + judged[r.index] - 1 for r in requests())


def everything(rank: int, world: int, directories, known):
    return teacher_passes(rank, directories, known), together(rank, directories)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(make("qwen3", root / "student")),
        "teacher": str(make("qwen3", root / "teacher", hidden_size=48, num_hidden_layers=2)),
    }


@pytest.fixture(scope="module")
def known(directories):
    settings = reference_step.Settings(k=K, steps=0)
    return reference_step.run(directories["student"], directories["teacher"], answers(), settings)


@pytest.fixture(scope="module")
def results(directories, known):
    return run_distributed(4, everything, directories, known)


@pytest.mark.parametrize("way", ["separate", "segments", "bounded"])
@pytest.mark.parametrize("layout", TEACHERS)
def test_scores_equal_transformers(layout, way, results, known):
    for passes, _ in results:
        for i, score_ in enumerate(passes[layout, "overlap", way]):
            torch.testing.assert_close(score_.logprobs, known.teacher_logprobs[i], atol=1e-5, rtol=0)
            assert torch.equal(score_.columns["overlap"], known.overlap[i].float())


@pytest.mark.parametrize("way", ["separate", "segments"])
@pytest.mark.parametrize("layout", TEACHERS)
def test_a_teacher_with_prompts_of_its_own_reads_those(layout, way, results, known):
    for passes, _ in results:
        for i, score_ in enumerate(passes[layout, "own prompts", way]):
            torch.testing.assert_close(score_.logprobs, known.teacher_logprobs[i], atol=1e-5, rtol=0)
            assert torch.equal(score_.columns["overlap"], known.overlap[i].float())


@pytest.mark.parametrize("way", ["separate", "segments"])
@pytest.mark.parametrize("layout", TEACHERS)
def test_the_teachers_nucleus(layout, way, results, directories):
    teacher = reference_step.load(directories["teacher"])
    with torch.no_grad():
        logprobs = reference_step.logprobs(teacher, answers())
    seen = set()
    for i, (q, (_, y)) in enumerate(zip(logprobs, answers())):
        expected = reference.nucleus_accepts(q, y, K, TOP_P)
        seen |= set(expected)
        for passes, _ in results:
            found = passes[layout, "teacher_top_p", way][i]
            assert found.columns["accepted"].tolist() == expected
            torch.testing.assert_close(
                found.sampled_logprobs, q.gather(1, torch.tensor(y)[:, None])[:, 0].float(), atol=1e-5, rtol=0
            )
    assert seen == {True, False}


@pytest.mark.parametrize("pair", PAIRS)
def test_in_flight_that_never_fires_is_plain_distillation(pair, results):
    for _, runs in results:
        off, never = runs[pair]["off"], runs[pair]["never"]
        for a, b in zip(off.rollouts, never.rollouts, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.end_reason == b.end_reason
            assert torch.equal(a.logprobs, b.logprobs) and torch.equal(a.topk_ids, b.topk_ids)
        assert all(torch.equal(a, b) for a, b in zip(off.prune_weight, never.prune_weight))
        assert off.kept_length == never.kept_length and off.response_tokens == never.response_tokens
        for a, b in zip(off.scores, never.scores):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
        loss, norm, applied = runs[pair]["off step"]
        assert runs[pair]["never step"] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4), True)
        assert applied and loss > 0


@pytest.mark.parametrize("pair", PAIRS)
def test_in_flight_stops_where_the_whole_answer_is_spent(pair, results):
    for _, runs in results:
        after, flight, off = runs[pair]["after"], runs[pair]["in flight"], runs[pair]["off"]
        assert flight.effective_length == after.effective_length == runs[pair]["whole"].effective_length
        shorter = 0
        for cut, whole, effective in zip(flight.rollouts, off.rollouts, after.effective_length):
            assert cut.tokens.tolist() == whole.tokens[: len(cut)].tolist()
            spent = effective < len(whole)
            assert len(cut) == (max(1, effective) if spent else len(whole))
            shorter += len(cut) < len(whole)
            if cut.end_reason != "drift":
                assert cut.end_reason == whole.end_reason
        assert shorter >= 4
        assert "drift" in {r.end_reason for r in flight.rollouts}
        assert sum(flight.kept_length) == sum(after.kept_length)


@pytest.mark.parametrize("pair", PAIRS)
def test_scoring_stops_where_nothing_matters_any_more(pair, results):
    for _, runs in results:
        whole, after = runs[pair]["whole"], runs[pair]["after"]
        assert after.kept_length == whole.effective_length
        assert after.response_tokens == whole.response_tokens  # the denominator
        read = 0
        for i, effective in enumerate(whole.effective_length):
            judged = after.scores[i].measured
            length = len(whole.rollouts[i])
            assert min(length, effective + 1) <= judged <= max(FIRES["segment"], 2 * (effective + 1))
            read += judged
            for name in ("logprobs", "sampled_logprobs"):
                mine, theirs = getattr(after.scores[i], name), getattr(whole.scores[i], name)
                assert len(mine) == len(theirs) == length
                torch.testing.assert_close(mine[:judged], theirs[:judged], atol=1e-5, rtol=0)
            assert torch.equal(after.scores[i].columns["overlap"], whole.scores[i].columns["overlap"][:judged])
            assert torch.equal(after.prune_weight[i], whole.prune_weight[i])
        assert read < whole.response_tokens


@pytest.mark.parametrize("pair", PAIRS)
def test_no_token_is_fed_twice(pair, results):
    for _, runs in results:
        fed, needed = runs[pair]["fed"]
        assert fed == needed


def scores_of(overlaps: list[list[float]], unread: int = 0) -> list[TeacherScores]:
    """Of responses that are `unread` tokens longer than what the teacher has read of them."""
    found = []
    for overlap in overlaps:
        n, columns = len(overlap) + unread, {"overlap": torch.tensor(overlap), "accepted": torch.tensor(overlap) > 0.5}
        found.append(TeacherScores(torch.zeros(n, K), torch.zeros(n), columns, len(overlap)))
    return found


def rollouts_of(lengths: list[int]) -> list[Rollout]:
    zeros = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    return [Rollout(Prompt(0, "", [1]), i, z, z.float(), z, z.float(), "length", 0) for i, z in enumerate(zeros)]


OVERLAPS = [[1.0, 0.5, 0.9, 0.2, 0.8], [0.1], [0.9, 0.9, 0.6]]


@pytest.mark.parametrize("signal", ["overlap", "teacher_top_p"])
@pytest.mark.parametrize("cut", ["none", "reliability"])
def test_judging_follows_the_method(signal, cut):
    w_base = 0.5 if cut == "none" else 0.0
    prune = PruneConfig(signal=signal, cut=cut, w_drop=0.5, w_base=w_base)
    batch = assign_prune_weights(rollouts_of([5, 1, 3]), scores_of(OVERLAPS), prune, make_signal(prune))
    for i, overlap in enumerate(OVERLAPS):
        events = [o < 0.7 if signal == "overlap" else o <= 0.5 for o in overlap]
        expected = reference.reliability(events, [True] * len(overlap), 0.5, w_base)
        assert batch.prune_weight[i].tolist() == expected["loss_weight"]
        assert batch.effective_length[i] == expected["effective_length"]
        assert batch.events[i] == sum(events)
        assert batch.kept_length[i] == (len(overlap) if cut == "none" else expected["effective_length"])
    assert batch.response_tokens == 9


@pytest.mark.parametrize("signal", ["overlap", "teacher_top_p"])
def test_positions_that_the_teacher_has_not_read_are_no_events(signal):
    prune = PruneConfig(signal=signal, w_drop=0.25)
    batch = assign_prune_weights(rollouts_of([7, 3, 5]), scores_of(OVERLAPS, unread=2), prune, make_signal(prune))
    assert batch.events == [2, 1, 1 if signal == "overlap" else 0]
    assert batch.prune_weight[0].tolist()[5:] == [1.0, 1.0]  # 1 less two events' price of 0.25, and w_base


def test_what_a_broken_teacher_says_is_an_event():
    prune = PruneConfig(signal="overlap", w_drop=0.25)
    batch = assign_prune_weights(rollouts_of([2]), scores_of([[1.0, float("nan")]]), prune, make_signal(prune))
    assert batch.events == [1]


@pytest.mark.parametrize("key, value", [("teacher", {"precision": "bf16"}), ("prune", {"preset": "in_flight"})])
def test_fused_scoring_refuses_what_it_cannot_do(key, value):
    values = {
        "student": {"model": "s", "precision": "fp32"},
        "teacher": {"model": "t", "precision": "fp32"},
        "score": {"mode": "fused"},
        "data": {"prompts": "p.jsonl"},
    }
    parse_config(values)
    with pytest.raises(ConfigError, match="score.mode: fused"):
        parse_config({**values, key: {**values.get(key, {}), **value}})


def test_without_a_signal_everything_counts_fully():
    prune, nothing = PruneConfig(preset="off"), [[float("nan")] * n for n in (5, 1, 3)]
    batch = assign_prune_weights(rollouts_of([5, 1, 3]), scores_of(nothing), prune, make_signal(prune))
    assert [w.tolist() for w in batch.prune_weight] == [[1.0] * 5, [1.0], [1.0] * 3]
    assert batch.kept_length == batch.effective_length == [5, 1, 3] and batch.events == [0, 0, 0]
