"""The teacher watches running answers: it judges each segment and names the answers that are spent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from megatron_opd.config import PruneConfig
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.prune import ReliabilityState
from megatron_opd.rollout.base import Segment
from megatron_opd.scoring.incremental import SegmentScorer
from megatron_opd.scoring.view import to_scores
from megatron_opd.types import END_DRIFT, Rollout, TeacherScores


class Clock(Protocol):
    def phase(self, name: str) -> AbstractContextManager[None]: ...


class Watcher:
    """Judges running answers segment by segment and names those whose reliability is spent.

    Answers in `unstopped` are generated on: judged on with `after_drift: attenuate`, left to the verifier with `grpo`.
    """

    def __init__(
        self,
        teacher: Model,
        prune: PruneConfig,
        tokens: int,
        answers: int,
        clock: Clock,
        unstopped: set[int],
        places: int | None = None,
    ) -> None:
        """`answers`: their indices are below it. `places`: most that a replica of the teacher holds at once (all)."""
        self.prune, self.clock, self.unstopped = prune, clock, unstopped
        places = places or -(-answers // teacher.layout.replicas)
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
        overlap of NaN and the student's own log-probs."""
        parts, n = self.found[rollout.index], len(rollout)
        joined = {name: torch.cat([p[name] for p in parts])[:n] for name in parts[0]}
        missing = n - joined["overlap"].numel()
        if missing:
            unjudged = {
                "overlap": torch.full((missing,), float("nan")),
                "accepted": torch.ones(missing, dtype=torch.bool),
                "logprobs": rollout.topk_logprobs[n - missing :],
                "sampled_logprobs": rollout.logprobs[n - missing :],
            }
            joined = {name: torch.cat([column, unjudged[name]]) for name, column in joined.items()}
        return to_scores(joined)

    def cut(self, rollout: Rollout) -> Rollout:
        """The answer without what its last segment holds behind the drift point."""
        n = self._length(rollout.index, len(rollout))
        if n == len(rollout):
            return rollout
        return Rollout(
            rollout.prompt,
            rollout.index,
            rollout.tokens[:n],
            rollout.logprobs[:n],
            rollout.topk_ids[:n],
            rollout.topk_logprobs[:n],
            END_DRIFT,
            rollout.policy_version,
        )

    def _length(self, index: int, total: int) -> int:
        """At least one token stays: an answer may be spent at its first position."""
        if index in self.unstopped or not bool(self.state.spent[index]):
            return total
        return max(1, int(self.state.effective_length[index]))
