"""Forward passes with a key/value cache through every pipeline stage, for generation and for scoring by segment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.compat.gpt_model import head_input, run_chunk, set_input
from megatron_opd.compat.megatron import plain_linears, set_sequence_parallel
from megatron_opd.models.fp8 import renew_fp8_copies, token_block
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow, decode_row, prefill_row
from megatron_opd.models.paged import BLOCK, KVCache

GIB = 1 << 30


def block_bytes(model: Model) -> int:
    """Bytes of one block of keys and values in all layers of a stage: every stage has as many layers."""
    config = model.config
    layers = config.num_layers // model.layout.groups.pp.size()
    heads = config.num_query_groups // model.layout.groups.tp.size()
    return 2 * BLOCK * layers * heads * config.kv_channels * config.params_dtype.itemsize


class CachedForward:
    """One model's running sequences. All ranks of the model's pipeline make the same calls in the same order.

    With `cache_gib`, keys and values take at most so many GiB of this rank's device.
    """

    def __init__(self, model: Model, slots: int, cache_gib: float | None = None) -> None:
        self.model = model
        limit = None if cache_gib is None else int(cache_gib * GIB) // block_bytes(model)
        self.cache = KVCache(slots, limit)
        self._rows: Tensor | slice | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation mode, no gradients, sequence parallelism off (a decode step has too few tokens to split)."""
        chunks = self.model.chunks
        renew_fp8_copies(chunks)  # an optimizer step may lie behind the last pass
        training = [chunk.training for chunk in chunks]
        sequence = self.model.config.sequence_parallel
        stack = ExitStack()
        try:
            stack.enter_context(head_input(chunks, self._wanted))
            for chunk in chunks:
                chunk.eval()
                stack.enter_context(plain_linears(chunk))
                if sequence:
                    set_sequence_parallel(chunk, False)
            with torch.no_grad():
                yield
        finally:
            stack.close()
            for chunk, was_training in zip(chunks, training):
                if sequence:
                    set_sequence_parallel(chunk, True)
                chunk.train(was_training)

    def prefill(
        self, tokens: Tensor, lengths: list[int], starts: list[int], slots: list[int], rows: Tensor | None
    ) -> Tensor | None:
        """Runs `tokens` [T] (sequences of `lengths`, continuing at `starts`, cached at `slots`).

        Returns:
            On the last stage the logits [R, vocab / tp] of the tokens named by `rows` [R] (all where None); None
            elsewhere.
        """
        self.cache.bring(slots, [start + length for start, length in zip(starts, lengths)])
        row = prefill_row(lengths, starts, slots, self.cache, self.model.device, self._padding(tokens))
        return self._forward(tokens, row, rows)

    def needs(self, tokens: int) -> str:
        """What to set a bound to that has no room for one sequence of so many tokens, for an error's message."""
        gib = -(-tokens // BLOCK) * block_bytes(self.model) / GIB
        return (
            f"the {tokens} tokens of one prompt and response take {gib:.3g} GiB on a rank; set it to {1.01 * gib:.3g}"
        )

    def decode(self, tokens: Tensor, lengths: list[int]) -> Tensor | None:
        """Runs one token [B] for each sequence at slots 0..B-1, whose lengths [B] count it -> [B, vocab / tp]."""
        row = decode_row(lengths, self.cache, self.model.device, self._padding(tokens))
        return self._forward(tokens, row, None)

    def _padding(self, tokens: Tensor) -> int:
        return -tokens.numel() % token_block(self.model.config)

    def _wanted(self, hidden: Tensor) -> Tensor:
        """Of the output layer's input, only the hidden states whose logits are wanted."""
        return hidden if self._rows is None else hidden[self._rows]

    def _forward(self, tokens: Tensor, row: PackedRow, rows: Tensor | slice | None) -> Tensor | None:
        model, pp = self.model, self.model.layout.groups.pp
        if row.padding:
            rows = slice(tokens.numel()) if rows is None else rows
            tokens = torch.nn.functional.pad(tokens, (0, row.padding))
        size, rank = pp.size(), pp.rank()
        following = dist.get_global_rank(pp, (rank + 1) % size)
        previous = dist.get_global_rank(pp, (rank - 1) % size)
        self._rows = rows
        out: Tensor | None = None  # of the chunk before, on this stage
        for number, chunk in enumerate(model.chunks):
            first = rank == 0 and number == 0
            last = rank == size - 1 and number == len(model.chunks) - 1
            if not first:
                if size > 1:
                    out = torch.empty(
                        tokens.numel(),
                        1,
                        model.config.hidden_size,
                        dtype=model.config.pipeline_dtype,
                        device=model.device,
                    )
                    dist.recv(out, previous, group=pp)
                assert out is not None  # with one stage, the chunk before has run
                set_input(chunk, out)
            out = run_chunk(chunk, tokens, row)
            if not last and size > 1:
                dist.send(out.contiguous(), following, group=pp)
        return out[0] if out is not None and model.layout.is_last_stage else None
