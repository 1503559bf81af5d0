"""A rollout engine: transformers' model of the student on every rank, which generates the rank's share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.parallel.collective import all_gather
from megatron_opd.rollout.base import EngineSetup, Request, RolloutEngine, Sampling, Segment, Watch
from megatron_opd.rollout.megatron.sampler import sample
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, Rollout

COLUMNS = ("tokens", "logprobs", "topk_ids", "topk_logprobs")


class Running:
    """A response on the rank that generates it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.unread = request.prompt.tokens  # tokens that the cache does not have yet
        self.cache: Any = None
        self.made = 0
        self.end = ""


class TransformersEngine(RolloutEngine):
    def __init__(
        self, setup: EngineSetup, attention: str = "eager"
    ) -> None:  # rollout.engine_options: {attention: sdpa}
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention {attention} must be eager or sdpa")
        student, model = setup.student, setup.config.student.model
        self.device, self.vocab_size, self.eos_ids = student.device, student.vocab_size, setup.eos_ids
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=student.config.params_dtype, attn_implementation=attention, local_files_only=True
        )
        self.model.to(self.device).eval()

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        own = self.model.state_dict()
        for name, parameter in named_parameters():  # collective: every rank goes through all of them
            own[name].copy_(parameter)
        self.policy_version = version

    @torch.no_grad()
    def probe(self, tokens: list[int]) -> Tensor:
        logits = self.model(torch.tensor([tokens], device=self.device)).logits[0, :-1, : self.vocab_size]
        return logits.float().log_softmax(-1).cpu().gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    @torch.no_grad()
    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        mine = {r.index: Running(r) for r in requests[dist.get_rank() :: dist.get_world_size()]}
        parts: dict[int, list[dict[str, Tensor]]] = {r.index: [] for r in requests}
        ends: dict[int, str] = {}
        while len(ends) < len(requests):
            steps = segment if watch else sampling.max_tokens
            new = {i: self._extend(running, sampling, steps) for i, running in mine.items() if i not in ends}
            shared = {i: found for share in all_gather(new) for i, found in share.items()}  # the same on every rank
            segments = []
            for request in requests:
                if request.index in shared:
                    part, end = shared[request.index]
                    start = sum(len(p["tokens"]) for p in parts[request.index])
                    columns = part["tokens"], part["topk_ids"], part["topk_logprobs"]
                    segments.append(Segment(request, start, *columns, finished=bool(end)))
                    parts[request.index].append(part)
                    if end:
                        ends[request.index] = end
            for index in watch(segments) if watch else ():
                ends.setdefault(index, END_DRIFT)  # what has ended by itself in this segment keeps its own reason
        self.tokens_sampled = sum(len(part["tokens"]) for own in parts.values() for part in own)
        return [self._rollout(request, parts[request.index], ends[request.index]) for request in requests]

    def _extend(self, running: Running, sampling: Sampling, steps: int) -> tuple[dict[str, Tensor], str]:
        """Up to so many tokens more, on the CPU, and why the response ended, where it did."""
        made = []
        while len(made) < steps and not running.end:
            fed = torch.tensor([running.unread], device=self.device)
            out = self.model(fed, past_key_values=running.cache, use_cache=True)
            index, position = (torch.tensor([n], device=self.device) for n in (running.request.index, running.made))
            # The package's sampler: (seed, index, position) decides, so neither order nor number of ranks matters.
            made.append(sample(out.logits[0, -1:, : self.vocab_size], sampling, index, position, self.vocab_size, None))
            running.cache, running.unread = out.past_key_values, made[-1].tokens.tolist()
            running.made += 1
            if running.unread[0] in self.eos_ids:
                running.end = END_EOS
            elif running.made == sampling.max_tokens:
                running.end = END_LENGTH
        return {name: torch.cat([getattr(s, name) for s in made]).cpu() for name in COLUMNS}, running.end

    def _rollout(self, request: Request, parts: list[dict[str, Tensor]], end: str) -> Rollout:
        columns = {name: torch.cat([part[name] for part in parts]) for name in COLUMNS}
        return Rollout(request.prompt, request.index, **columns, end_reason=end, policy_version=self.policy_version)
