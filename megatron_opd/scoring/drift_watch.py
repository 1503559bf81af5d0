"""The teacher reads running responses piece by piece and names those whose reliability is spent."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_opd.config import PruneConfig
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.prune import ReliabilityState
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.rollout.base import Segment
from megatron_opd.scoring.base import Clock
from megatron_opd.scoring.segments import SegmentScorer
from megatron_opd.scoring.teacher_view import columns_of, to_scores
from megatron_opd.types import END_DRIFT, Rollout, TeacherScores


class DriftWatch:
    """What an engine calls with new segments (`rollout.base.Watch`); remembers what the teacher said of them.

    Responses in `unstopped` are generated on past their drift point. With `after_drift: attenuate` the teacher reads
    them on, with `grpo` it does not.
    """

    def __init__(
        self,
        teacher: Model,
        signal: DriftSignal,
        prune: PruneConfig,
        tokens_per_microbatch: int,
        responses: int,
        clock: Clock,
        unstopped: set[int],
        slots: int | None = None,
        sends_hidden: bool = False,
    ) -> None:
        """`responses`: their indices are below it. `slots`: most that a replica of the teacher holds at once (None:
        its share of all)."""
        self.signal, self.clock, self.unstopped = signal, clock, unstopped
        self.reads_on = prune.after_drift == "attenuate"
        slots = slots or -(-responses // teacher.layout.replicas)
        self.scorer = SegmentScorer(teacher, signal, tokens_per_microbatch, slots, sends_hidden)
        self.state = ReliabilityState(responses, prune.threshold, prune.w_drop, prune.w_base)
        self.views: dict[int, list[Fields]] = {}  # of each response's segments, in order

    def __call__(self, segments: list[Segment]) -> set[int]:
        """Reads the segments; returns the indices of the responses to stop."""
        with self.clock.phase("score"):
            wanted = [s for s in segments if self.reads_on or not bool(self.state.spent[s.request.index])]
            views = self.scorer.score(wanted)
            stop = set()
            for segment in wanted:
                index = segment.request.index
                self.views.setdefault(index, []).append(views[index])
                events = self.signal.response_events(columns_of(views[index]), len(segment.tokens))[None]
                self.state.update_from_events(events, torch.ones_like(events), torch.tensor([index]))
                if bool(self.state.spent[index]) and not self.reads_on:
                    self.scorer.release(index)
                    stop |= {index} - self.unstopped
        return stop

    def scores(self, rollout: Rollout) -> TeacherScores:
        """Of one response as it is trained on: what its last segment holds behind the drift point may be cut off."""
        views, length = self.views[rollout.index], len(rollout)
        fields = {name: torch.cat([v[name] for v in views]) for name in views[0]}
        scores = to_scores({name: column[:length] for name, column in fields.items()}, rollout)
        return replace(scores, read=len(fields["sampled_logprobs"]))

    def cut(self, rollout: Rollout) -> Rollout:
        """The response without what its last segment holds behind the drift point; at least one token stays, for it may
        be spent at its first."""
        if rollout.index in self.unstopped or not bool(self.state.spent[rollout.index]):
            return rollout
        length = max(1, int(self.state.effective_length[rollout.index]))
        if length >= len(rollout):
            return rollout
        return replace(rollout.first(length), end_reason=END_DRIFT)
