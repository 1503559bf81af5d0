"""A rollout engine whose responses are drawn at random: for layouts in which the Megatron engine does not generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_opd.rollout.base import EngineSetup, Request, RolloutEngine, Sampling, Watch
from megatron_opd.rollout.reference import own_logprobs
from megatron_opd.types import END_LENGTH, Rollout


class DrawnEngine(RolloutEngine):
    """Holds no parameters: its log-probs on the probe prompt are the trainer's."""

    def __init__(self, setup: EngineSetup) -> None:
        self.student = setup.student

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        for name, tensor in named_parameters():
            assert tensor.is_cuda, f"{name} is not on the GPU"
        self.policy_version = version

    def probe(self, tokens: list[int]) -> Tensor:
        return own_logprobs(self.student, tokens)

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        return [self._draw(request, sampling) for request in requests]

    def _draw(self, request: Request, sampling: Sampling) -> Rollout:
        generator = torch.Generator().manual_seed(request.index)  # the same on every rank
        scores = torch.randn(sampling.max_tokens, self.student.vocab_size, generator=generator).log_softmax(-1)
        logprobs, ids = scores.topk(sampling.top_logprobs, dim=-1)
        return Rollout(
            request.prompt,
            request.index,
            ids[:, 0].clone(),
            logprobs[:, 0].clone(),
            ids,
            logprobs,
            END_LENGTH,
            self.policy_version,
        )
