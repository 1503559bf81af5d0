"""Answers and the teacher's scores of them: one after the other, or, in flight, at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from megatron_opd.config import Config, PruneConfig
from megatron_opd.models.build import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.prune import ReliabilityState
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment
from megatron_opd.scoring.incremental import SegmentScorer
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.view import to_scores
from megatron_opd.types import Rollout, TeacherScores


class Clock(Protocol):
    def phase(self, name: str) -> AbstractContextManager[None]: ...


def score(
    engine: RolloutEngine, teacher: Model, requests: list[Request], sampling: Sampling, config: Config, clock: Clock
) -> tuple[list[Rollout], list[TeacherScores]]:
    """Generates and scores one step's answers; collective, the same result on every rank."""
    prune, tokens = config.prune, config.train.tokens_per_microbatch
    if not prune.in_flight:
        with clock.phase("rollout"):
            engine.wake()
            rollouts = engine.generate(requests, sampling)
            engine.sleep()
        with clock.phase("score"), teacher.resident():
            return rollouts, score_rollouts(teacher, rollouts, prune, tokens)
    watcher = Watcher(teacher, prune, tokens, len(requests), clock, to_the_end(requests, config))
    with clock.phase("rollout"), teacher.resident():
        engine.wake()
        rollouts = engine.generate(requests, sampling, watcher, prune.segment)
        engine.sleep()
    rollouts = [watcher.cut(r) for r in rollouts]
    return rollouts, [watcher.scores(r) for r in rollouts]


def to_the_end(requests: list[Request], config: Config) -> set[int]:
    """Indices of the answers that are generated on past their drift point."""
    prune = config.prune
    if not prune.in_flight or prune.after_drift == "drop":
        return set()
    if prune.after_drift == "attenuate":
        return {r.index for r in requests}
    prompts = round(prune.grpo_share * config.train.prompts_per_step)  # the loader has shuffled them
    return {r.index for r in requests if r.index // config.train.answers_per_prompt < prompts}


class Watcher:
    """Judges running answers segment by segment and names those whose reliability is spent.

    Answers in `unstopped` are generated on: judged on with `after_drift: attenuate`, left to the verifier with `grpo`.
    """

    def __init__(
        self, teacher: Model, prune: PruneConfig, tokens: int, answers: int, clock: Clock, unstopped: set[int]
    ) -> None:
        self.prune, self.clock, self.unstopped = prune, clock, unstopped
        places = -(-answers // teacher.layout.data_size)
        self.scorer = SegmentScorer(teacher, prune, tokens, places)
        self.state = ReliabilityState(answers, prune.threshold, prune.w_drop, prune.w_base)
        self.found: dict[int, list[Fields]] = {}

    def __call__(self, segments: list[Segment]) -> set[int]:
        with self.clock.phase("score"):
            judged_on = self.prune.after_drift == "attenuate"
            judged = [s for s in segments if judged_on or not bool(self.state.spent[s.request.index])]
            views = self.scorer.score(judged)
            stop = set()
            for segment in judged:
                index = segment.request.index
                view = views[index]
                self.found.setdefault(index, []).append(view)
                events = self._events(view)[None]
                self.state.update_from_events(events, torch.ones_like(events), torch.tensor([index]))
                if bool(self.state.spent[index]) and not judged_on:
                    self.scorer.release(index)
                    stop |= {index} - self.unstopped
        return stop

    def _events(self, view: Fields) -> torch.Tensor:
        if self.prune.signal == "teacher_top_p":
            return ~view["accepted"]
        return ~(view["overlap"] >= self.prune.threshold)  # NaN, from a broken teacher, is an event

    def scores(self, rollout: Rollout) -> TeacherScores:
        """All segments' scores of one answer that `cut` has ended; positions that the teacher no longer judged have an
        overlap of NaN and log-probs of 0."""
        parts, n = self.found[rollout.index], len(rollout)
        joined = {name: torch.cat([p[name] for p in parts])[:n] for name in parts[0]}
        missing = n - joined["overlap"].numel()
        if missing:
            unjudged = {"overlap": float("nan"), "accepted": True}
            joined = {
                name: torch.cat([column, column.new_full((missing, *column.shape[1:]), unjudged.get(name, 0.0))])
                for name, column in joined.items()
            }
        return to_scores(joined)

    def cut(self, rollout: Rollout) -> Rollout:
        """The answer without what its last segment holds behind the drift point."""
        n = self._length(rollout.index, len(rollout))
        if n == len(rollout):
            return rollout
        return Rollout(
            rollout.prompt, rollout.index, rollout.tokens[:n], rollout.logprobs[:n], rollout.topk_ids[:n],
            rollout.topk_logprobs[:n], rollout.end_reason, rollout.weight_version,
        )  # fmt: skip

    def _length(self, index: int, total: int) -> int:
        """At least one token stays: an answer may be spent at its first position."""
        if index in self.unstopped or not bool(self.state.spent[index]):
            return total
        return max(1, int(self.state.effective_length[index]))
