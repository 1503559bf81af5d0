"""Megatron-Core's forward-backward schedules over micro-batches of packed, unequal rows.

Every rank knows the whole plan, so a stage knows the shape that its neighbour sends: `PlannedP2P` takes it from the
plan where Megatron-Core would exchange shapes before every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.compat.megatron import P2PCommunicator, P2PWithKnownShapes
from megatron_opd.parallel.groups import Layout

M = TypeVar("M")  # a micro-batch


class PlannedP2P(P2PWithKnownShapes):
    """Pipeline communication whose shapes come from the plan. For the non-interleaved schedules, in which every stage
    receives micro-batches, and later their gradients, in order."""

    def __init__(
        self, pp_group: torch.distributed.ProcessGroup, config: TransformerConfig, shapes: Sequence[list[int]]
    ) -> None:
        super().__init__(pp_group, config)
        self._forward: Iterator[list[int]] = iter(shapes)
        self._backward: Iterator[list[int]] = iter(shapes)

    def known_shapes(self, from_previous: bool, from_next: bool) -> tuple[list[int], list[int]]:
        none = [0, 0, 0]
        return next(self._forward) if from_previous else none, next(self._backward) if from_next else none


def run_schedule(
    forward_step: Callable[[Iterator[M], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]],
    chunks: Sequence[torch.nn.Module],
    config: TransformerConfig,
    layout: Layout,
    microbatches: Sequence[M],
    row_tokens: Sequence[int],
    forward_only: bool = False,
    collect: bool = False,
    width: int | None = None,
) -> list[Any]:
    """Runs 1F1B (or the interleaved schedule for several chunks) over this replica's micro-batches.

    Args:
        forward_step: Megatron-Core's forward step function: (iterator, model chunk) -> (output, loss function).
        chunks: the model's chunks on this stage.
        config: the model's TransformerConfig.
        layout: the model's groups.
        microbatches: what the iterator yields, at least one.
        row_tokens: tokens of each micro-batch's row, those of all context-parallel ranks, padding included.
        forward_only: no gradients.
        width: columns of what travels between stages; None: the hidden size.
        collect: the loss function returns data instead of a loss (Megatron-Core's collect_non_loss_data).

    Returns:
        What the loss functions returned, on the last stage; an empty list elsewhere.
    """
    groups = layout.groups
    if not microbatches:
        raise ValueError("the schedule needs at least one micro-batch")
    split = layout.parallel.context * (layout.parallel.tensor if config.sequence_parallel else 1)
    if len(chunks) > 1:
        p2p = P2PCommunicator(groups.pp, config)
    else:
        p2p = PlannedP2P(groups.pp, config, [[n // split, 1, width or config.hidden_size] for n in row_tokens])
    vp = len(chunks) if len(chunks) > 1 else None
    run = get_forward_backward_func(groups.pp.size(), vp)
    iterators = [iter(microbatches) for _ in chunks]
    return run(
        forward_step_func=forward_step,
        data_iterator=iterators if vp else iterators[0],
        model=list(chunks) if vp else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=max(row_tokens),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        p2p_communicator=p2p,
        pg_collection=groups,
    )
