"""Rows of packed tokens: the one form in which tokens go through a model, in training, scoring and generation.

A row holds several sequences one after the other, without padding: tokens [1, T], hidden states [T, 1, hidden]. It
says where each sequence begins, which position each token has in its own sequence, and, in generation, which blocks of
a key/value cache (`paged.py`) belong to it. `PackedAttention` is the attention core that reads it; Transformer
Engine's core reads the same row through its THD fields. Under context parallelism each rank holds a part of every
sequence of a row (`parallel/context.py`); rows with a cache are never split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad as zero_pad
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_opd.models.paged import KVCache
from megatron_opd.parallel.context import held_chunks, held_positions, row_order
from megatron_opd.parallel.staging import to_device

_MASKED_QUERIES = 512  # queries behind earlier keys need a mask: for so many of them at a time
_GATHERED_TOKENS = 1 << 18  # decode: cached positions whose keys and values are brought together at a time


@dataclass
class PackedRow(PackedSeqParams):
    """Packed sequences; see the module's docstring. Built by `pack_row`, `prefill_row` and `decode_row`."""

    positions: Tensor | None = None  # [T / cp] int64, of each token that this rank holds in its own sequence
    lengths: list[int] = field(default_factory=list)  # tokens of each sequence in this row, T in all
    context: tuple[int, int] = (0, 1)  # context-parallel rank and size
    cache: KVCache | None = None
    addresses: Tensor | None = None  # [T] int64, where in the cache's pools each token's keys and values go
    starts: list[int] = field(default_factory=list)  # position of each sequence's first token in this row
    earlier: list[Tensor] = field(default_factory=list)  # blocks [n] int64 of each sequence; empty where it starts here
    table: Tensor | None = None  # decode: [B, n] int64, blocks of each sequence
    padding: int = 0  # tokens at the row's end that belong to no sequence: FP8 wants whole blocks; with a cache only
    _keep: Tensor | None = None  # decode: [B, 1, 1, longest] bool, which cached positions a token may see
    _held: Tensor | None = None  # [T / cp] int64, positions in the row of the tokens that this rank holds
    _order: Tensor | None = None  # [T] int64, where each of the row's tokens lies in all ranks' parts

    def take(self, values: Tensor) -> Tensor:
        """This rank's part [T / cp, ...] of what belongs to the whole row [T, ...]."""
        return values if self._held is None else values[self._held.to(values.device)]

    def in_order(self, parts: Tensor) -> Tensor:
        """All ranks' parts [T, ...], one behind the other, in the order of the row."""
        if self._order is None:
            (self._order,) = to_device([row_order(self.lengths, self.context[1])], parts.device)
        return parts[self._order]

    def keep_mask(self) -> Tensor:
        if self._keep is None:
            assert self.positions is not None and self.table is not None
            cached = torch.arange(self.max_seqlen_kv, device=self.positions.device)
            self._keep = (cached[None] <= self.positions[: len(self.table), None])[:, None, None]
        return self._keep


def pack_row(lengths: list[int], device: torch.device, thd: bool, context: tuple[int, int] = (0, 1)) -> PackedRow:
    """A row of whole sequences, without a cache. `thd`: for Transformer Engine's attention.

    With `context`, this rank's part of it; the lengths are padded ones (`parallel.context.padded_length`). Padding
    stands behind a sequence's tokens, which never look at it: to attention it is part of the sequence. So Transformer
    Engine sees no padding between sequences (`cu_seqlens_q_padded` stays empty) and every backend may serve; the
    cumulative and the longest lengths are of whole sequences, it divides them by the group's size.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    held = held_positions(lengths, *context) if context[1] > 1 else None
    positions = positions if held is None else positions[held]
    ends, positions = to_device([ends, positions], device)
    return PackedRow(
        qkv_format="thd" if thd else "sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=positions,
        lengths=lengths,
        context=context,
        _held=held,
    )


def prefill_row(
    lengths: list[int], starts: list[int], slots: list[int], cache: KVCache, device: torch.device, padding: int = 0
) -> PackedRow:
    """A row whose tokens continue cached sequences (or begin them, start 0) at the given slots."""
    ends = [s + n for s, n in zip(starts, lengths)]
    cache.reserve(slots, ends)
    positions = numpy.concatenate([numpy.arange(s, e) for s, e in zip(starts, ends)])
    addresses = cache.addresses(numpy.repeat(slots, lengths), positions)
    earlier = [cache.table([p], e)[0] if s else addresses[:0] for p, s, e in zip(slots, starts, ends)]
    columns = [numpy.pad(positions, (0, padding)), addresses, *earlier]
    on_device = to_device([torch.from_numpy(column) for column in columns], device)
    return PackedRow(
        qkv_format="sbhd",
        max_seqlen_q=max(ends),
        max_seqlen_kv=max(ends),
        lengths=lengths,
        cache=cache,
        positions=on_device[0],
        addresses=on_device[1],
        starts=starts,
        earlier=on_device[2:],
        padding=padding,
    )


def decode_row(lengths: list[int], cache: KVCache, device: torch.device, padding: int = 0) -> PackedRow:
    """One new token for each of the sequences at slots 0..B-1; their `lengths` [B] count it."""
    slots = numpy.arange(len(lengths))
    cache.reserve(slots, lengths)
    longest = max(lengths)
    positions = numpy.array(lengths) - 1
    table = cache.table(slots, longest)
    columns = [numpy.pad(positions, (0, padding)), cache.addresses(slots, positions), table]
    on_device = to_device([torch.from_numpy(column) for column in columns], device)
    return PackedRow(
        qkv_format="sbhd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=on_device[0],
        cache=cache,
        addresses=on_device[1],
        table=on_device[2],
        padding=padding,
    )


class PackedRotary(torch.nn.Module):
    """Rotary embedding by each token's own position; wraps Megatron-Core's, which knows one position per row."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def get_rotary_seq_len(
        self,
        context: object,
        transformer: torch.nn.Module,
        transformer_input: Tensor,
        config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> PackedRow:
        assert isinstance(packed_seq_params, PackedRow), "models run on packed rows"
        return packed_seq_params

    def forward(
        self, row: PackedRow, packed_seq: bool = False, cp_group: torch.distributed.ProcessGroup | None = None
    ) -> Tensor:
        """[T / cp, 1, 1, head dim] for rows that our core reads, [longest, 1, 1, head dim] for THD rows: of those
        Megatron-Core takes each sequence's two chunks itself (`_apply_rotary_pos_emb_thd`)."""
        if packed_seq:
            return self.rotary(row.max_seqlen_q, packed_seq=True, cp_group=cp_group)
        longest = -(-row.max_seqlen_q // 256) * 256  # few distinct lengths: the wrapped module caches its tables
        return self.rotary(longest, packed_seq=True)[row.positions]  # packed: not split over context-parallel ranks


class PackedAttention(MegatronModule):
    """Causal attention over packed rows by torch's scaled_dot_product_attention; no [S, S] mask is kept.

    The counterpart of Megatron-Core's DotProductAttention, which has no packed sequences, and of Transformer Engine's
    on GPUs, which this one serves beside for generation with a cache. Under context parallelism every rank gathers the
    row's keys and values and attends with its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp if pg_collection is not None else None
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T / cp, 1, heads / tp, head dim], key and value [T / cp, 1, kv heads / tp, head dim] ->
        [T / cp, 1, heads / tp * head dim]."""
        row = packed_seq_params
        assert isinstance(row, PackedRow), "PackedAttention runs on packed rows"
        tokens = query.shape[0] - row.padding
        query, key, value = (x.view(x.shape[0], x.shape[-2], x.shape[-1])[:tokens] for x in (query, key, value))
        if row.context[1] > 1:
            out = self._part(query, key, value, row)
        elif row.cache is None:
            out = self._whole(query, key, value, row)
        elif row.table is None:
            out = self._prefill(query, key, value, row)
        else:
            out = self._decode(query, key, value, row)
        out = out.reshape(tokens, 1, -1)
        return zero_pad(out, (0, 0, 0, 0, 0, row.padding)) if row.padding else out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, past: int = 0) -> Tensor:
        """query [s, h, d], key and value [past + s, g, d] -> [s, h, d]"""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        if not past:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return out[0].transpose(0, 1)
        outs = []
        for start in range(0, query.shape[0], _MASKED_QUERIES):  # a mask of so many rows, whatever the lengths
            part = q[:, :, start : start + _MASKED_QUERIES]
            end = past + start + part.shape[2]
            block = (part, k[:, :, :end], v[:, :, :end], past + start)
            # In training the backward pass makes each block's mask again: none is kept.
            again = torch.is_grad_enabled()
            outs.append(
                checkpoint(self._masked, *block, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._masked(*block)
            )
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """q [1, h, s, d] behind `past` keys of k and v [1, h, past + s, d]"""
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        if len(row.lengths) == 1:
            return self._attend(query, key, value)
        parts = (x.split(row.lengths) for x in (query, key, value))
        return torch.cat([self._attend(q, k, v) for q, k, v in zip(*parts)])

    def _part(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        """This rank's two chunks of every sequence, each against all that comes before it."""
        assert self.context_group is not None
        rank, size = row.context
        # In the backward pass the gradients of keys and values are summed over the ranks and split again.
        parts = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.context_group)
        keys, values = row.in_order(parts).split([key.shape[-1], value.shape[-1]], -1)
        outs = []
        held = query.split([n // size for n in row.lengths])
        for q, k, v in zip(held, keys.split(row.lengths), values.split(row.lengths)):
            chunk = len(q) // 2
            for part, number in zip(q.split(chunk), held_chunks(rank, size)):
                end = (number + 1) * chunk
                outs.append(self._attend(part, k[:end], v[:end], end - chunk))
        return torch.cat(outs)

    def _cached(self, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        """The layer's pool [2, blocks, BLOCK, g, d] with this row's keys and values [T, g, d] in it."""
        assert row.cache is not None and row.addresses is not None
        pool = row.cache.pool(self.layer_number, key)
        tokens = pool.flatten(1, 2)
        tokens[0].index_copy_(0, row.addresses, key)
        tokens[1].index_copy_(0, row.addresses, value)
        return pool

    def _prefill(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        keys, values = self._cached(key, value, row)
        outs = []
        parts = (x.split(row.lengths) for x in (query, key, value))
        for q, k, v, start, blocks in zip(*parts, row.starts, row.earlier):
            if start:
                k, v = (pool[blocks].flatten(0, 1)[: start + len(q)] for pool in (keys, values))
            outs.append(self._attend(q, k, v, start))
        return torch.cat(outs)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow) -> Tensor:
        assert row.table is not None
        pool = self._cached(key, value, row)
        batch, heads, dim = query.shape
        kv_heads = key.shape[1]
        mask = row.keep_mask()
        longest = mask.shape[-1]
        # A group's query heads stand where a longer query would: no key is copied per head.
        grouped = query.view(batch, kv_heads, heads // kv_heads, dim)
        at_once = max(1, _GATHERED_TOKENS // longest)
        outs = []
        for part, blocks, keep in zip(grouped.split(at_once), row.table.split(at_once), mask.split(at_once)):
            keys, values = (x[blocks].flatten(1, 2)[:, :longest].transpose(1, 2) for x in pool)
            outs.append(scaled_dot_product_attention(part, keys, values, attn_mask=keep, scale=self.scale))
        return torch.cat(outs).reshape(batch, heads, dim)
