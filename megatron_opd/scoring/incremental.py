"""The teacher's view of answers while they are being generated: segment by segment, no token twice."""

from __future__ import annotations

import torch

from megatron_opd.config import PruneConfig
from megatron_opd.models.cached import CachedForward
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import Fields, share_fields
from megatron_opd.rollout.base import Segment
from megatron_opd.scoring.view import Candidates, teacher_view


class SegmentScorer:
    """Scores segments as they come; keeps the teacher's keys and values of every running answer.

    Every rank calls it with the same segments. Answers are spread over the teacher's replicas.
    """

    def __init__(self, teacher: Model, prune: PruneConfig, tokens_per_microbatch: int, places: int) -> None:
        self.teacher, self.prune = teacher, prune
        self.tokens = tokens_per_microbatch
        self.forward = CachedForward(teacher, places)
        self._replica: dict[int, int] = {}  # answer -> replica of the teacher
        self._free: list[list[int]] = [list(range(places))[::-1] for _ in range(teacher.layout.replicas)]
        self._place: dict[int, int] = {}
        self._cached: dict[int, int] = {}  # answer -> tokens in the cache
        self._last: dict[int, int] = {}  # answer -> newest token, not yet in the cache

    def score(self, segments: list[Segment]) -> dict[int, Fields]:
        """The teacher's view of each segment's tokens, by answer index; see `teacher_view`."""
        layout = self.teacher.layout
        for s in segments:
            self._admit(s)
        mine = [s for s in segments if self._replica[s.request.index] == layout.replica]
        owned: list[tuple[int, Fields]] = []
        with self.forward.session():
            for batch in self._batches(mine):
                owned += self._run(batch)
        for s in segments:
            index = s.request.index
            fed = len(s.tokens) + (len(s.request.prompt.tokens) - 1 if s.start == 0 else 0)
            self._cached[index] += fed
            self._last[index] = int(s.tokens[-1])
            if s.finished:
                self.release(index)
        return share_fields(owned, layout.owns_results, self.teacher.device)

    def release(self, index: int) -> None:
        """The answer has ended: its place is free."""
        if index in self._place:
            self._free[self._replica.pop(index)].append(self._place.pop(index))
            del self._cached[index]
            self._last.pop(index, None)

    def _admit(self, segment: Segment) -> None:
        index = segment.request.index
        if index in self._place:
            return
        replica = max(range(len(self._free)), key=lambda r: (len(self._free[r]), -r))
        if not self._free[replica]:
            places = len(self._free) * self.forward.cache.places
            raise RuntimeError(f"more than {places} answers at once; the engine exceeds rollout.max_batch")
        self._replica[index] = replica
        self._place[index] = self._free[replica].pop()
        self._cached[index] = 0

    def _batches(self, segments: list[Segment]) -> list[list[Segment]]:
        batches: list[list[Segment]] = []
        room = 0
        for s in segments:
            tokens = len(s.tokens) + (len(s.request.prompt.tokens) if s.start == 0 else 0)
            if not batches or tokens > room:
                batches.append([])
                room = self.tokens
            batches[-1].append(s)
            room -= tokens
        return batches

    def _run(self, segments: list[Segment]) -> list[tuple[int, Fields]]:
        fed: list[int] = []
        wanted: list[int] = []
        lengths, at = [], 0
        for s in segments:
            before = s.request.prompt.tokens if s.start == 0 else [self._last[s.request.index]]
            tokens = [*before, *s.tokens[:-1].tolist()]
            wanted += range(at + len(before) - 1, at + len(tokens))
            at += len(tokens)
            fed += tokens
            lengths.append(len(tokens))
        device = self.teacher.device
        logits = self.forward.prefill(
            torch.tensor(fed, device=device),
            lengths,
            [self._cached[s.request.index] for s in segments],
            [self._place[s.request.index] for s in segments],
            torch.tensor(wanted, device=device),
        )
        if logits is None:
            return []
        asked = Candidates(
            torch.cat([s.topk_ids for s in segments]).to(device), torch.cat([s.tokens for s in segments]).to(device)
        )
        view = teacher_view(logits, asked, self.prune, self.teacher.vocab_size, self.teacher.layout.groups.tp)
        split = {name: column.split([len(s.tokens) for s in segments]) for name, column in view.items()}
        return [(s.request.index, {n: p[i].cpu() for n, p in split.items()}) for i, s in enumerate(segments)]
