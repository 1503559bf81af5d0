"""Responses while vLLM generates them: tokens and candidates in arrays, and how they reach every rank.

A position takes 8 bytes per candidate kept and 8 for the sampled token, a sixteenth more for growth; as Python objects
it would take a hundred times that. Only the K candidates that were asked for stay: the few more that vLLM returns (see
`common.EXTRA_CANDIDATES`) are sorted out every `_BLOCK` positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.parallel.collective import rank_and_size
from megatron_opd.parallel.exchange import share_fields
from megatron_opd.rollout.base import Request, Segment
from megatron_opd.rollout.vllm.common import EXTRA_CANDIDATES, RolloutError
from megatron_opd.types import END_DRIFT, Rollout

_BLOCK = 64  # positions whose candidates are sorted together
_CPU = torch.device("cpu")


def top_candidates(ids: Tensor, logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely of the candidates [T, C], descending, ties to the lowest id: two [T, k] tensors."""
    order = ids.argsort(dim=-1)
    ids, logprobs = ids.gather(-1, order), logprobs.gather(-1, order)
    logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order)[:, :k], logprobs[:, :k]


class CandidateTable:
    """The `k` most likely tokens of each position of one response, descending, ties to the lowest id."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.width = k + EXTRA_CANDIDATES + 1  # vLLM may list the sampled token beside the candidates
        self._ids, self._logprobs = array("i"), array("f")  # [sorted positions * k]
        self._pending = 0  # positions that are not sorted yet
        self._pending_ids: numpy.ndarray | None = None  # [_BLOCK, width] int32
        self._pending_logprobs: numpy.ndarray | None = None  # [_BLOCK, width] float32

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds, room for growth included."""
        held = sum(column.__sizeof__() for column in (self._ids, self._logprobs))
        pending = (self._pending_ids, self._pending_logprobs)
        return held + sum(column.nbytes for column in pending if column is not None)

    def append(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Adds a position's candidates, k to k + EXTRA_CANDIDATES + 1 of them, in any order.

        Raises RolloutError where they are fewer or more.
        """
        if not self.k:
            return
        count = len(ids)
        if not self.k <= count <= self.width:
            raise RolloutError(f"the engine returned {count} candidates at a position, {self.k} were asked for")
        if self._pending_ids is None or self._pending_logprobs is None:
            self._pending_ids = numpy.empty((_BLOCK, self.width), dtype=numpy.int32)
            self._pending_logprobs = numpy.empty((_BLOCK, self.width), dtype=numpy.float32)
        position = self._pending
        self._pending_ids[position, :count] = ids
        self._pending_logprobs[position, :count] = logprobs
        self._pending_ids[position, count:] = numpy.iinfo(numpy.int32).max  # sorted behind all that is there
        self._pending_logprobs[position, count:] = -numpy.inf
        self._pending += 1
        if self._pending == _BLOCK:
            self._sort()

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        done = len(self._ids) // self.k if self.k else 0
        self._pending = max(0, min(self._pending, length - done))
        del self._ids[length * self.k :], self._logprobs[length * self.k :]

    def finish(self) -> None:
        """No more positions will come: frees what only appending needs."""
        self._sort()
        self._pending_ids = self._pending_logprobs = None

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of some positions: ids [n, k] int64 and log-probs [n, k] float32."""
        self._sort()
        part = slice(start * self.k, stop * self.k)
        shape = (stop - start, self.k)
        ids = torch.from_numpy(numpy.array(self._ids[part], dtype=numpy.int64))
        logprobs = torch.from_numpy(numpy.array(self._logprobs[part], dtype=numpy.float32))
        return ids.view(shape), logprobs.view(shape)

    def _sort(self) -> None:
        if not self._pending or self._pending_ids is None or self._pending_logprobs is None:
            return
        pending_ids = torch.from_numpy(self._pending_ids[: self._pending])
        pending_logprobs = torch.from_numpy(self._pending_logprobs[: self._pending])
        ids, logprobs = top_candidates(pending_ids, pending_logprobs, self.k)
        self._ids.frombytes(ids.contiguous().numpy().tobytes())
        self._logprobs.frombytes(logprobs.contiguous().numpy().tobytes())
        self._pending = 0


class Response:
    """One response while it is generated, with its `k` candidates per position."""

    def __init__(self, request: Request, k: int):
        self.request = request
        self.tokens, self.logprobs = array("i"), array("f")
        self.candidates = CandidateTable(k)
        self.end: str | None = None  # the end reason, once there is one
        self.shown = 0  # response tokens that the watcher has seen
        self.seen_end = False  # the watcher has seen that it ended
        self.pinned = 0  # tokens that a server is given as part of the prompt

    def append(self, token: int, logprob: float, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Adds one token with its candidates."""
        self.candidates.append(ids, logprobs)
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        del self.tokens[length:], self.logprobs[length:]
        self.candidates.truncate(length)

    def finish(self, reason: str) -> None:
        """It has ended, for one of the end reasons."""
        self.end = reason
        self.candidates.finish()

    def due(self, segment: int) -> bool:
        """Whether a segment is complete that the watcher has not seen."""
        return not self.seen_end and (self.end is not None or len(self.tokens) - self.shown >= segment)

    def missing(self, segment: int) -> int:
        """Tokens until the next segment is complete."""
        return segment - (len(self.tokens) - self.shown)

    def next_segment(self, segment: int) -> Segment:
        """The next segment; they lie at multiples of `segment`, so what the watcher sees is the same in any mode."""
        start, stop = self.shown, min(self.shown + segment, len(self.tokens))
        self.shown = stop
        self.seen_end = self.end is not None and stop == len(self.tokens)
        tokens = torch.tensor(self.tokens[start:stop], dtype=torch.int64)
        first = self.request.generated + start
        return Segment(self.request, first, tokens, *self.candidates.slice(start, stop), self.seen_end)

    def stop(self) -> None:
        """Ends the response behind what the watcher has seen."""
        if not self.seen_end:
            self.seen_end = True
            self.truncate(self.shown)
            self.finish(END_DRIFT)

    def rollout(self, version: int) -> Rollout:
        """The finished response."""
        assert self.end is not None
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        sampled = torch.tensor(self.logprobs, dtype=torch.float32)
        candidates = self.candidates.slice(0, len(self.tokens))
        return Rollout(self.request.prompt, self.request.index, tokens, sampled, *candidates, self.end, version)


def due_segments(responses: Iterable[Response], segment: int) -> list[Segment]:
    """At most one new segment of each response, so that a stop always means: behind this segment."""
    return [response.next_segment(segment) for response in responses if response.due(segment)]


def share_segments(
    segments: Sequence[Segment], owner: bool, requests: Mapping[int, Request], group: dist.ProcessGroup | None
) -> list[Segment]:
    """Every rank gets the owners' segments; tensors travel as they are, not pickled. Collective over `group`.

    Args:
        owner: whether this rank's segments count.
        requests: all requests by index; a segment gets the caller's own object.
    """
    if rank_and_size(group)[1] == 1:
        return list(segments)
    items = [
        ((s.request.index, s.start, s.finished), {"tokens": s.tokens, "ids": s.topk_ids, "topk": s.topk_logprobs})
        for s in segments
    ]
    return [
        Segment(requests[index], start, fields["tokens"], fields["ids"], fields["topk"], finished)
        for (index, start, finished), fields in share_fields(items, owner, _CPU, group).items()
    ]


def share_rollouts(
    responses: Iterable[Response],
    owner: bool,
    requests: Mapping[int, Request],
    version: int,
    group: dist.ProcessGroup | None,
) -> list[Rollout]:
    """Every rank gets the owners' finished responses, as `share_segments` does with segments."""
    mine = [response.rollout(version) for response in responses]
    if rank_and_size(group)[1] == 1:
        return mine
    items = [
        (
            (r.index, r.end_reason),
            {"tokens": r.tokens, "logprobs": r.logprobs, "ids": r.topk_ids, "topk": r.topk_logprobs},
        )
        for r in mine
    ]
    return [
        Rollout(requests[index].prompt, index, f["tokens"], f["logprobs"], f["ids"], f["topk"], end, version)
        for (index, end), f in share_fields(items, owner, _CPU, group).items()
    ]
