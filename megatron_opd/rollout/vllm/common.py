"""What both vLLM modes share; imports torch alone, so that a trainer can talk to servers without vLLM installed.

Log-probs come from vLLM's raw log-probs: temperature 1.0, full vocabulary, before top-p and top-k. vLLM leaves the
order of equal log-probs open, so `EXTRA_CANDIDATES` more than K are asked for and sorted here, ties to the lowest id.
More equal log-probs than that at rank K cannot be told apart: which of them are returned is then vLLM's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megatron_opd.errors import RunError
from megatron_opd.rollout.base import Request, Sampling, Segment
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, Rollout

EXTRA_CANDIDATES = 4
CONTROL_TIMEOUT = timedelta(days=1)  # of groups in which ranks wait for a whole generation; the guard bounds steps
END_REASONS = {"stop": END_EOS, "length": END_LENGTH}


class RolloutError(RunError):
    """Generation cannot go on; the message says where and why."""


def request_seed(seed: int, index: int, position: int = 0) -> int:
    """The sampler's seed of one answer: the same on every layout, engine and order of completion."""
    digest = hashlib.blake2b(f"{seed}:{index}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch generators take a signed 64-bit seed


def sampling_arguments(sampling: Sampling, seed: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams; as JSON, the body of a generate request.

    EOS ids are stop tokens, which vLLM keeps in the answer; `ignore_eos` keeps it from adding its own.
    """
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "logprobs": sampling.top_logprobs + EXTRA_CANDIDATES if sampling.top_logprobs else 0,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
        "detokenize": False,
    }


def check_requests(requests: Sequence[Request], sampling: Sampling, max_model_len: int) -> None:
    """Raises ValueError where a request cannot reach `sampling.max_tokens`, or where an index appears twice."""
    for request in requests:
        length = len(request.prompt.tokens)
        if not length:
            raise ValueError(f"prompt {request.prompt.uid} is empty")
        if length + sampling.max_tokens > max_model_len:
            raise ValueError(
                f"prompt {request.prompt.uid} has {length} tokens; with {sampling.max_tokens} to generate that is more "
                f"than rollout.max_model_len: {max_model_len}"
            )
    if len({request.index for request in requests}) != len(requests):
        raise ValueError("two requests have the same index; an index names one answer of the batch")


def top_candidates(ids: Tensor, logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely of the candidates [T, C], descending, ties to the lowest id: two [T, k] tensors."""
    order = ids.argsort(dim=-1)
    ids, logprobs = ids.gather(-1, order), logprobs.gather(-1, order)
    logprobs, order = logprobs.sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order)[:, :k], logprobs[:, :k]


class Answer:
    """One answer while it is generated."""

    def __init__(self, request: Request, k: int):
        self.request, self.k = request, k
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.candidates: list[tuple[list[int], list[float]]] = []  # per token, ids and log-probs, at least k of them
        self.end: str | None = None  # the end reason, once there is one
        self.shown = 0  # response tokens that the watcher has seen
        self.seen_end = False  # the watcher has seen that it ended
        self.pinned = 0  # tokens that a server is given as part of the prompt

    def append(self, token: int, logprob: float, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Adds one token with its candidates."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.candidates.append((list(ids), list(logprobs)))

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        del self.tokens[length:], self.logprobs[length:], self.candidates[length:]

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
        ids, logprobs = self._top(start, stop)
        return Segment(self.request, start, torch.tensor(self.tokens[start:stop]), ids, logprobs, self.seen_end)

    def stop(self) -> None:
        """Ends the answer behind what the watcher has seen."""
        if not self.seen_end:
            self.end, self.seen_end = END_DRIFT, True
            self.truncate(self.shown)

    def rollout(self, version: int) -> Rollout:
        """The finished answer."""
        assert self.end is not None
        ids, logprobs = self._top(0, len(self.tokens))
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        sampled = torch.tensor(self.logprobs, dtype=torch.float32)
        return Rollout(self.request.prompt, self.request.index, tokens, sampled, ids, logprobs, self.end, version)

    def _top(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.candidates[start:stop]
        if not rows or not self.k:
            shape = (len(rows), self.k)
            return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
        width = min(len(ids) for ids, _ in rows)  # a sampled token inside the top may be listed once or twice
        if width < self.k:
            raise RolloutError(f"the engine returned {width} candidates at a position, {self.k} were asked for")
        ids = torch.tensor([ids[:width] for ids, _ in rows])
        logprobs = torch.tensor([logprobs[:width] for _, logprobs in rows], dtype=torch.float32)
        return top_candidates(ids, logprobs, self.k)


def due_segments(answers: Iterable[Answer], segment: int) -> list[Segment]:
    """At most one new segment of each answer, so that a stop always means: behind this segment."""
    return [answer.next_segment(segment) for answer in answers if answer.due(segment)]


def buckets(named: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups (name, tensor) pairs, copied to the CPU, into dictionaries of at most `limit` bytes (one tensor at least).

    The copy lets the producer reuse its buffers.
    """
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


def agreeing_probe(rows: list[list[float]], names: Sequence[str], tolerance: float) -> Tensor:
    """The first engine's probe [T-1] float32; raises RolloutError where another differs by more than `tolerance`."""
    values = torch.tensor(rows, dtype=torch.float32)
    gaps = (values - values[0]).abs().amax(dim=1)
    worst = int(gaps.argmax())
    if not gaps[worst] <= tolerance:  # NaN is not
        raise RolloutError(
            f"engines hold different parameters: on the probe prompt, {names[worst]} differs from {names[0]} by "
            f"{gaps[worst]:.4f} nats, more than rollout.sync_tolerance: {tolerance}"
        )
    return values[0]
