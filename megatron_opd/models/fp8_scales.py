"""The first scales of FP8's delayed scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_opd.compat.gpt_model import run_chunk
from megatron_opd.models.model import Model
from megatron_opd.parallel.schedule import run_schedule

_LEARNING_TOKENS = 1024


@torch.enable_grad()
def learn_scales(model: Model) -> None:
    """Two training passes over random tokens, without backward, from which delayed scaling takes its first scales.

    With the scales of 1 that it begins with, parameters of the usual size would keep two bits. Gradients have theirs
    only from the first micro-batch of the first step on. Collective over the model's ranks.
    """
    row, tokens = model.row([_LEARNING_TOKENS])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (tokens,), generator=generator).to(model.device)

    def forward_step(iterator: Iterator[int], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        next(iterator)
        return run_chunk(chunk, ids, row), lambda output, non_loss_data: None

    for chunk in model.chunks:
        chunk.train()
    count = model.layout.parallel.pipeline  # the interleaved schedule wants a multiple
    for _ in range(2):
        run_schedule(
            forward_step,
            model.chunks,
            model.config,
            model.layout,
            range(count),
            [tokens] * count,
            forward_only=True,
            collect=True,
        )
