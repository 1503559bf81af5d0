"""After generation, with `prune.cut: reliability`: the teacher reads a response until its reliability is spent."""

from __future__ import annotations

import math

from megatron_opd.config import PruneConfig
from megatron_opd.models.model import Model
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.rollout.base import Request, Sampling, Segment
from megatron_opd.scoring.base import Clock, Scoring
from megatron_opd.scoring.drift_watch import DriftWatch
from megatron_opd.types import Rollout, TeacherScores

_CACHED_MICROBATCHES = 4  # keys and values held at once, in micro-batches' worth of tokens


class UntilSpentScoring(Scoring):
    """All responses are generated to their end; what lies behind their drift points is neither read nor trained on."""

    def generate_and_score(
        self, requests: list[Request], sampling: Sampling, clock: Clock
    ) -> tuple[list[Rollout], list[TeacherScores]]:
        with clock.phase("rollout"):
            rollouts = self._generate(requests, sampling)
        prune, tokens, hidden = self.config.prune, self.config.train.tokens_per_microbatch, self.sends_hidden
        with clock.phase("score"):
            return rollouts, self.teachers.judge(
                rollouts,
                lambda teacher, of_it: score_until_spent(teacher, of_it, self.signal, prune, tokens, clock, hidden),
            )


def score_until_spent(
    teacher: Model,
    rollouts: list[Rollout],
    signal: DriftSignal,
    prune: PruneConfig,
    tokens_per_microbatch: int,
    clock: Clock,
    sends_hidden: bool = False,
) -> list[TeacherScores]:
    """Scores whole responses in pieces and stops each where its reliability is spent.

    A piece is never shorter than the number of events that are still missing, and pieces double: at most half of what
    the teacher reads of a response was not needed, and one that never drifts takes few of them. Collective, the same
    result on every rank.
    """
    longest = max(len(r.prompt.teacher_tokens) + len(r) for r in rollouts)
    replicas = teacher.layout.replicas
    slots = min(-(-len(rollouts) // replicas), max(1, _CACHED_MICROBATCHES * tokens_per_microbatch // longest))
    by_index = {r.index: r for r in rollouts}
    indices = max(by_index) + 1  # more than responses, where some are carried over
    watch = DriftWatch(teacher, signal, prune, tokens_per_microbatch, indices, clock, set(), slots, sends_hidden)
    limit = math.ceil((1 - 1e-8) / prune.w_drop)  # events that spend a response
    waiting = sorted(by_index, key=lambda i: len(by_index[i]))  # the longest first: popped from the end
    read: dict[int, int] = {}  # tokens that the teacher has read of each response in its cache
    while waiting or read:
        while waiting and len(read) < slots * replicas:
            read[waiting.pop()] = 0
        pieces = []
        for index, start in read.items():
            missing = limit - int(watch.state.counts[index])
            pieces.append(_piece(by_index[index], start, max(prune.segment, start, missing)))
        spent = watch(pieces)
        for piece in pieces:
            read[piece.request.index] += len(piece.tokens)
            if piece.finished or piece.request.index in spent:
                del read[piece.request.index]
    return [watch.scores(r) for r in rollouts]


def _piece(rollout: Rollout, start: int, tokens: int) -> Segment:
    part = slice(start, start + tokens)
    return Segment(
        Request(rollout.prompt, rollout.index),
        start,
        rollout.tokens[part],
        rollout.topk_ids[part],
        rollout.topk_logprobs[part],
        finished=start + tokens >= len(rollout),
    )
