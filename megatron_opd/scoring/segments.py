"""The teacher's view of responses that arrive in segments: no token is read twice."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from megatron_opd.models.cached import CachedForward
from megatron_opd.models.headless import HeadInput
from megatron_opd.models.model import Model
from megatron_opd.models.paged import BLOCK, CacheFull
from megatron_opd.parallel.exchange import Fields, share_fields
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.rollout.base import Segment
from megatron_opd.scoring.teacher_view import HIDDEN, Candidates, teacher_view


class SegmentScorer:
    """Scores segments as they come; keeps the teacher's keys and values of every running response.

    Every rank calls it with the same segments. Responses are spread over the teacher's replicas, each of which has
    `slots` of them in its cache at once.
    """

    def __init__(
        self, teacher: Model, signal: DriftSignal, tokens_per_microbatch: int, slots: int, sends_hidden: bool = False
    ) -> None:
        self.teacher, self.signal = teacher, signal
        self.tokens, self.slots = tokens_per_microbatch, slots
        self.forward = CachedForward(teacher, slots, teacher.cache_gib)
        self.head_input = HeadInput(teacher) if sends_hidden else None
        self._free: list[list[int]] = [list(range(slots))[::-1] for _ in range(teacher.layout.replicas)]
        # Of each running response, by its index:
        self._replica: dict[int, int] = {}  # of the teacher
        self._slot: dict[int, int] = {}  # in that replica's cache
        self._cached: dict[int, int] = {}  # tokens in the cache
        self._last: dict[int, int] = {}  # its newest token, not yet in the cache

    def score(self, segments: list[Segment]) -> dict[int, Fields]:
        """The teacher's view of each segment's tokens, by the response's index; see `teacher_view`."""
        layout = self.teacher.layout
        for s in segments:
            self._admit(s)
        mine = [s for s in segments if self._replica[s.request.index] == layout.replica]
        owned: list[tuple[int, Fields]] = []
        with self.forward.session(), self.head_input.recorded() if self.head_input else nullcontext():
            for batch in self._batches(mine):
                owned += self._run(batch)
        for s in segments:
            index = s.request.index
            self._cached[index] += len(s.tokens) + (len(s.request.prompt.teacher_tokens) - 1 if s.start == 0 else 0)
            self._last[index] = int(s.tokens[-1])
            if s.finished:
                self.release(index)
        return share_fields(owned, layout.owns_results, self.teacher.device)

    def release(self, index: int) -> None:
        """The response has ended: its slot is free."""
        if index in self._slot:
            replica, slot = self._replica.pop(index), self._slot.pop(index)
            self._free[replica].append(slot)
            if replica == self.teacher.layout.replica:
                self.forward.cache.release(slot)
            del self._cached[index]
            self._last.pop(index, None)

    def _admit(self, segment: Segment) -> None:
        index = segment.request.index
        if index in self._slot:
            return
        replica = max(range(len(self._free)), key=lambda r: (len(self._free[r]), -r))
        if not self._free[replica]:
            raise RuntimeError(
                f"more than {len(self._free) * self.slots} responses at once; the engine exceeds rollout.max_batch"
            )
        self._replica[index] = replica
        self._slot[index] = self._free[replica].pop()
        self._cached[index] = 0

    def _batches(self, segments: list[Segment]) -> list[list[Segment]]:
        """Passes of at most `tokens` tokens, or one longer segment, whose keys and values fit the cache together."""
        batches: list[list[Segment]] = []
        limit, room, blocks = self.forward.cache.limit, 0, 0
        for s in segments:
            tokens = len(s.tokens) + (len(s.request.prompt.teacher_tokens) if s.start == 0 else 0)
            length = self._cached[s.request.index] + tokens
            needed = -(-length // BLOCK)
            if limit is not None and needed > limit:
                bound = f"teacher.cache_gib: {self.teacher.cache_gib:g}"
                raise CacheFull(f"{bound} is too small: {self.forward.needs(length)} or more (null is no bound)")
            if not batches or tokens > room or (limit is not None and needed > blocks):
                batches.append([])
                room, blocks = self.tokens, limit or 0
            batches[-1].append(s)
            room -= tokens
            blocks -= needed
        return batches

    def _run(self, segments: list[Segment]) -> list[tuple[int, Fields]]:
        """One forward pass: each segment, behind the prompt or the token that its cache does not have yet."""
        fed: list[int] = []
        predicting: list[int] = []
        lengths = []
        for s in segments:
            before = s.request.prompt.teacher_tokens if s.start == 0 else [self._last[s.request.index]]
            tokens = [*before, *s.tokens[:-1].tolist()]
            predicting += range(len(fed) + len(before) - 1, len(fed) + len(tokens))
            fed += tokens
            lengths.append(len(tokens))
        device = self.teacher.device
        logits = self.forward.prefill(
            torch.tensor(fed, device=device),
            lengths,
            [self._cached[s.request.index] for s in segments],
            [self._slot[s.request.index] for s in segments],
            torch.tensor(predicting, device=device),
        )
        if logits is None:
            return []
        view = teacher_view(logits, Candidates.of(segments, device), self.signal, self.teacher)
        if self.head_input is not None:
            view[HIDDEN] = self.head_input.take()
        split = {name: column.split([len(s.tokens) for s in segments]) for name, column in view.items()}
        return [(s.request.index, {n: p[i].cpu() for n, p in split.items()}) for i, s in enumerate(segments)]
