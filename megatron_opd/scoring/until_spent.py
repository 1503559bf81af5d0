"""The teacher's pass where only reliable positions matter: each answer is read as far as its reliability reaches."""

from __future__ import annotations

import math

from megatron_opd.config import PruneConfig
from megatron_opd.models.model import Model
from megatron_opd.rollout.base import Request, Segment
from megatron_opd.scoring.watch import Clock, Watcher
from megatron_opd.types import Rollout, TeacherScores

_CACHED_MICROBATCHES = 4  # keys and values held at once, in micro-batches' worth of tokens


def score_until_spent(
    teacher: Model, rollouts: list[Rollout], prune: PruneConfig, tokens_per_microbatch: int, clock: Clock
) -> list[TeacherScores]:
    """Scores whole answers in pieces and stops each where its reliability is spent (`prune.cut: reliability`).

    A piece is never shorter than the events that are still missing, and pieces double, so that at most half of what an
    answer's teacher reads was not needed and an answer that never drifts takes few of them. Positions behind have an
    overlap of NaN. Collective, the same result on every rank.
    """
    longest = max(len(r.prompt.tokens) + len(r) for r in rollouts)
    replicas = teacher.layout.replicas
    places = min(-(-len(rollouts) // replicas), max(1, _CACHED_MICROBATCHES * tokens_per_microbatch // longest))
    watcher = Watcher(teacher, prune, tokens_per_microbatch, len(rollouts), clock, set(), places)
    limit = math.ceil((1 - 1e-8) / prune.w_drop)  # events that spend an answer
    by_index = {r.index: r for r in rollouts}
    waiting = sorted(by_index, key=lambda i: len(by_index[i]))  # the longest first: popped from the end
    read: dict[int, int] = {}  # answers on their way, and how many of their tokens have been judged
    while waiting or read:
        while waiting and len(read) < places * replicas:
            read[waiting.pop()] = 0
        segments = []
        for index, start in read.items():
            missing = limit - int(watcher.state.counts[index])
            segments.append(_piece(by_index[index], start, max(prune.segment, start, missing)))
        stopped = watcher(segments)
        for s in segments:
            read[s.request.index] += len(s.tokens)
            if s.finished or s.request.index in stopped:
                del read[s.request.index]
    return [watcher.scores(r) for r in rollouts]


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
