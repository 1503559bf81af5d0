"""Generation by the training ranks themselves: Megatron-Core's layers with a key/value cache.

Each replica of the student (context-parallel ranks are replicas here: no sequence is split) takes every replicas-th
request and keeps up to `max_batch` responses running; a finished response's slot goes to the next waiting request.
Works in the student's own tensor and pipeline layout, with the trainer's own parameters, so nothing is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.models.cached import CachedForward
from megatron_opd.models.model import Model
from megatron_opd.models.paged import CacheFull
from megatron_opd.parallel.exchange import Fields, share_fields
from megatron_opd.rollout.base import EngineSetup, Request, RolloutEngine, Sampling, Segment, Watch
from megatron_opd.rollout.megatron.sampler import Sampled, sample
from megatron_opd.rollout.reference import own_logprobs
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, Rollout

PREFILL_TOKENS = 16384  # read in one pass, or one prompt: responses that go on may be long and many
_RUNNING, _EOS, _LENGTH = 0, 1, 2
_REASONS = {_EOS: END_EOS, _LENGTH: END_LENGTH}


class MegatronEngine(RolloutEngine):
    """See the module's docstring. `eos_ids` end a response and belong to it. `cache_gib`: most GiB that keys and values
    take on a rank; requests wait until they fit at their longest (CacheFull: one that never does)."""

    def __init__(self, model: Model, eos_ids: set[int], max_batch: int, cache_gib: float | None = None) -> None:
        self.model = model
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=model.device)
        self.max_batch, self.cache_gib = max_batch, cache_gib

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        self.policy_version = version

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        layout = self.model.layout
        mine = list(range(len(requests)))[layout.replica :: layout.replicas]
        batch = _Batch(self, [requests[i] for i in mine], sampling)
        numbers = {requests[i].index: i for i in mine}
        parts: list[list[Fields]] = [[] for _ in requests]
        stopped: set[int] = set()
        with batch.forward.session():
            while True:
                batch.run(steps=segment if watch else None)
                shared = share_fields(
                    [(mine[local], fields) for local, fields in batch.collect()], layout.owns_results, self.model.device
                )
                if not shared:
                    break
                for i, fields in shared.items():
                    parts[i].append(fields)
                if watch is None:
                    break
                stop = watch([_segment(requests[i], parts[i]) for i in sorted(shared)])
                stopped |= {i for i in range(len(requests)) if requests[i].index in stop and not _ended(parts[i])}
                batch.stop({mine.index(numbers[index]) for index in stop if index in numbers})
        sampled = torch.tensor(batch.sampled if layout.owns_results else 0)
        dist.all_reduce(sampled)
        self.tokens_sampled = int(sampled)
        return [
            self._rollout(request, parts[i], i in stopped, sampling.top_logprobs) for i, request in enumerate(requests)
        ]

    def probe(self, tokens: list[int]) -> Tensor:
        """The engine samples from the trainer's own parameters: their log-probs of tokens[1:], [T-1] float32."""
        return own_logprobs(self.model, tokens)

    def _rollout(self, request: Request, parts: list[Fields], stopped: bool, candidates: int) -> Rollout:
        if not parts:  # dropped while it waited
            none = torch.empty(0)
            table = none.view(0, candidates)
            return Rollout(
                request.prompt, request.index, none.long(), none, table.long(), table, END_DRIFT, self.policy_version
            )
        joined = {name: torch.cat([p[name] for p in parts]) for name in ("tokens", "logprobs", "ids", "topk")}
        return Rollout(
            prompt=request.prompt,
            index=request.index,
            tokens=joined["tokens"],
            logprobs=joined["logprobs"],
            topk_ids=joined["ids"],
            topk_logprobs=joined["topk"],
            end_reason=END_DRIFT if stopped else _REASONS[int(parts[-1]["state"])],
            policy_version=self.policy_version,
        )


def megatron_engine(setup: EngineSetup) -> MegatronEngine:
    """What `rollout.engine: megatron` builds."""
    rollout = setup.config.rollout
    return MegatronEngine(setup.student, setup.eos_ids, rollout.max_batch, rollout.cache_gib)


def _ended(parts: list[Fields]) -> bool:
    return bool(parts) and int(parts[-1]["state"]) != _RUNNING


def _segment(request: Request, parts: list[Fields]) -> Segment:
    new = parts[-1]
    start = request.generated + sum(p["tokens"].numel() for p in parts[:-1])
    return Segment(request, start, new["tokens"], new["ids"], new["topk"], _ended(parts))


class _Batch:
    """One replica's running responses, at cache slots 0..B-1. Every rank of the replica holds the same lengths and
    tokens; what the last stage sampled is known there alone until `collect` hands it out."""

    def __init__(self, engine: MegatronEngine, requests: list[Request], sampling: Sampling) -> None:
        self.model, self.eos = engine.model, engine.eos
        self.requests, self.sampling, self.on_progress = requests, sampling, engine.on_progress
        self.forward = CachedForward(engine.model, max(1, min(engine.max_batch, len(requests))), engine.cache_gib)
        self.cache_gib = engine.cache_gib
        self.waiting = list(range(len(requests)))[::-1]
        device = engine.model.device
        self.indices = torch.tensor([r.index for r in requests], dtype=torch.int64, device=device)
        self.begun = torch.tensor([r.generated for r in requests], dtype=torch.int64, device=device)
        self.request = torch.empty(0, dtype=torch.int64, device=device)  # [B] local request of each slot
        self.last = torch.empty(0, dtype=torch.int64, device=device)  # [B] newest token, not yet cached
        self.generated = torch.empty(0, dtype=torch.int64, device=device)  # [B] response tokens so far
        self.lengths: list[int] = []  # [B] tokens of each slot's prompt and response, known without asking the device
        self.state = torch.zeros(len(requests), dtype=torch.int64, device=device)
        self.sampled = 0  # tokens, so far
        self.records: list[tuple[Tensor, Sampled]] = []  # since the last `collect`

    def run(self, steps: int | None) -> None:
        """Generates up to `steps` tokens for every running response (None: until all have ended)."""
        while steps is None or steps > 0:
            if not self.request.numel() and not self.waiting:
                return
            if self.request.numel():
                self._decode()
                if steps is not None:
                    steps -= 1
            self._admit()
            if self.on_progress is not None:
                unfinished = len(self.waiting) + len(self.lengths)
                self.on_progress(len(self.requests) - unfinished, len(self.requests), self.sampled)

    def stop(self, local: set[int]) -> None:
        """Drops running responses, and waiting ones."""
        if local:
            self.waiting = [n for n in self.waiting if n not in local]
            self._drop(torch.isin(self.request, torch.tensor(sorted(local), device=self.request.device)).tolist())

    def collect(self) -> list[tuple[int, Fields]]:
        """New tokens of every response that has any, since the last call; empty where results are not owned."""
        records, self.records = self.records, []
        if not records or not self.model.layout.owns_results:
            return []
        request = torch.cat([indices for indices, _ in records])
        order = request.argsort(stable=True)  # records come in time order
        locals_, counts = request[order].unique_consecutive(return_counts=True)
        columns = {
            "tokens": torch.cat([s.tokens for _, s in records])[order],
            "logprobs": torch.cat([s.logprobs for _, s in records])[order],
            "ids": torch.cat([s.topk_ids for _, s in records])[order],
            "topk": torch.cat([s.topk_logprobs for _, s in records])[order],
        }
        split = {name: column.split(counts.tolist()) for name, column in columns.items()}
        return [
            (local, {name: parts[i] for name, parts in split.items()} | {"state": self.state[local : local + 1]})
            for i, local in enumerate(locals_.tolist())
        ]

    def _decode(self) -> None:
        self._take(self.forward.decode(self.last, self.lengths), self.request, self.generated)

    def _admit(self) -> None:
        """Prefills waiting prompts into free slots."""
        free = self.forward.cache.slots - self.request.numel()
        new: list[int] = []
        prompts: list[list[int]] = []
        room = PREFILL_TOKENS
        while self.waiting and len(new) < free and self._fits(self.waiting[-1], self.request.numel() + len(new)):
            prompt = self.requests[self.waiting[-1]].tokens
            if new and len(prompt) > room:
                break
            room -= len(prompt)
            prompts.append(prompt)
            new.append(self.waiting.pop())
        if not new:
            return
        lengths = [len(p) for p in prompts]
        device = self.model.device
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        slots = list(range(self.request.numel(), self.request.numel() + len(new)))
        logits = self.forward.prefill(tokens, lengths, [0] * len(new), slots, ends)
        request = torch.tensor(new, device=device)
        begun = self.begun[request]
        self.request = torch.cat([self.request, request])
        self.last = torch.cat([self.last, torch.zeros_like(request)])
        self.generated = torch.cat([self.generated, begun])
        self.lengths += lengths
        self._take(logits, request, begun, first=slots[0])

    def _fits(self, local: int, slot: int) -> bool:
        """Whether the bound on keys and values leaves room for the request at its longest; it waits where not."""
        cache, longest = self.forward.cache, len(self.requests[local].prompt.tokens) + self.sampling.max_tokens
        fits = cache.promise(slot, longest)
        if not fits and not cache.promised.any():
            needed = self.forward.needs(longest)
            raise CacheFull(
                f"rollout.cache_gib: {self.cache_gib:g} is too small: {needed} or more, or lower the budget"
            )
        return fits

    def _take(self, logits: Tensor | None, request: Tensor, position: Tensor, first: int = 0) -> None:
        """Samples the next token of the responses at slots from `first` on and drops those that end."""
        tokens = torch.empty_like(request)
        self.sampled += request.numel()
        groups = self.model.layout.groups
        if logits is not None:
            sampled = sample(logits, self.sampling, self.indices[request], position, self.model.vocab_size, groups.tp)
            tokens = sampled.tokens.contiguous()  # gloo sends memory in order, whatever the strides
            self.records.append((request, sampled))
        if groups.pp.size() > 1:
            dist.broadcast(tokens, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
        self.last[first:] = tokens
        self.generated[first:] += 1
        self.lengths[first:] = [length + 1 for length in self.lengths[first:]]
        ended = torch.isin(tokens, self.eos)
        full = self.generated[first:] >= self.sampling.max_tokens
        self.state[request] = torch.where(ended, _EOS, torch.where(full, _LENGTH, _RUNNING))
        self._drop([False] * first + (ended | full).tolist())  # the one time in a step that the host waits

    def _drop(self, dropped: list[bool]) -> None:
        """Frees slots; the last ones move into the holes, so that running responses stay in front."""
        if not any(dropped):
            return
        order = list(range(len(dropped)))
        holes = [slot for slot, drop in enumerate(dropped) if drop]
        dropped_slots = set(holes)
        for hole in holes:
            self.forward.cache.release(hole)
        for hole in holes:
            while order and order[-1] in dropped_slots and len(order) - 1 >= hole:
                order.pop()
            if hole >= len(order):
                break
            mover = order.pop()
            self.forward.cache.move(mover, hole)
            order[hole] = mover
        keep = torch.tensor(order, dtype=torch.int64, device=self.request.device)
        self.request, self.last, self.generated = self.request[keep], self.last[keep], self.generated[keep]
        self.lengths = [self.lengths[slot] for slot in order]
