"""Sampling from vocab-parallel logits: the same seed gives the same tokens on any layout.

Each (seed, response index, position) has one uniform number, from a hash; the token is where the cumulative probability
in id order passes it. Ranks exchange one summary of their shards and one result; whole logits travel only for top-p
and top-k, whose filters need an order over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.rollout.base import Sampling


@dataclass
class Sampled:
    """One token for each of B sequences, replicated over tensor ranks."""

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] float32, temperature 1, full vocabulary
    topk_ids: Tensor  # [B, K] int64
    topk_logprobs: Tensor  # [B, K] float32


def uniform(seed: int, index: Tensor, position: Tensor) -> Tensor:
    """[B] float64 in [0, 1): splitmix64 over (seed, index, position), both [B] int64."""
    seed = (seed + 2**63) % 2**64 - 2**63  # a step's seed may have outgrown 64 bits
    state = _mix(torch.full_like(index, seed) * -7046029254386353131 + index)
    state = _mix(state + position * -4658895280553007687)
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def sample(
    logits: Tensor,
    sampling: Sampling,
    index: Tensor,
    position: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> Sampled:
    """Samples one token per row.

    Args:
        logits: [B, vocab / tp], this rank's shard; ids from `vocab_size` on are padding.
        index, position: [B] int64, the response's index and the token's position in the response.
    """
    size = group.size() if group is not None else 1
    rank = group.rank() if group is not None else 0
    shard = logits.shape[1]
    offset = rank * shard
    x = logits.float()
    valid = vocab_size - offset
    if valid < shard:
        x = x.clone()
        x[:, max(valid, 0) :] = float("-inf")
    k = max(sampling.top_logprobs, 1)
    temperature = sampling.temperature or 1.0
    filtered = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)

    # One exchange: maximum, two sums of exponentials and the best k of every shard.
    width = min(k, shard)
    if shard <= 2048:  # one call instead of a search by blocks
        values, ids = (column[:, :width] for column in x.sort(dim=-1, descending=True, stable=True))
    else:
        values, ids = vocab_parallel_topk(x, width)
    peak = values[:, :1].double().clamp(min=-1e300)  # a shard of padding alone has no finite maximum
    wide = x.double()
    mass = (wide - peak).exp().sum(-1, keepdim=True)
    tempered = mass
    if temperature != 1.0:
        tempered = ((wide - peak) / temperature).exp().sum(-1, keepdim=True)
    mine = torch.cat([peak, mass, tempered, values.double(), (ids + offset).double()], 1)
    every = _all_gather(mine, group, size)  # [tp, B, 3 + 2 width]
    peaks = every[:, :, 0]
    top = peaks.max(0).values
    lse = top + ((peaks - top).exp() * every[:, :, 1]).sum(0).log()  # [B]
    values = every[:, :, 3 : 3 + width].transpose(0, 1).reshape(len(x), -1)
    ids = every[:, :, 3 + width :].transpose(0, 1).reshape(len(x), -1).long()
    values, order = values.sort(dim=-1, descending=True, stable=True)  # shards come in id order: ties to the lowest id
    ids = ids.gather(1, order)[:, :k]
    logprobs = values[:, :k] - lse[:, None]

    if sampling.temperature == 0:
        tokens, chosen = ids[:, 0], logprobs[:, 0]
    elif filtered:
        tokens = _sample_filtered(_full(x, group, size), sampling, uniform(sampling.seed, index, position))
        chosen = _pick(wide, tokens, offset, group, size) - lse
    else:
        masses = ((peaks - top) / temperature).exp() * every[:, :, 2]  # [tp, B]
        ends = masses.cumsum(0)
        target = uniform(sampling.seed, index, position) * ends[-1]
        owner = (ends <= target).sum(0).clamp(max=size - 1)
        # Every rank looks in its shard for every row: to pick the rows that are its own the host would have to wait.
        scale = ((peaks[rank] - top) / temperature).exp()
        local = _invert(((wide - peak) / temperature).exp(), (target - (ends[rank] - masses[rank])) / scale)
        both = torch.stack([(local + offset).double(), wide.gather(1, local[:, None])[:, 0]], 1)
        own = torch.where((owner == rank)[:, None], both, 0.0)
        if size > 1:
            dist.all_reduce(own, group=group)
        tokens, chosen = own[:, 0].long(), own[:, 1] - lse
    kept = sampling.top_logprobs
    return Sampled(tokens, chosen.float(), ids[:, :kept], logprobs[:, :kept].float())


def _invert(masses: Tensor, target: Tensor) -> Tensor:
    """Index [B] at which the running sum of `masses` [B, n] passes `target` [B]; never one of mass 0."""
    sums = masses.cumsum(-1)
    index = (sums <= target[:, None]).sum(-1)
    last = (sums < sums[:, -1:]).sum(-1)  # the first index that completes the sum has positive mass
    return torch.minimum(index, last)


def _sample_filtered(logits: Tensor, sampling: Sampling, u: Tensor) -> Tensor:
    """Top-k, then top-p (the token that crosses p is inside), on whole logits [B, V] in descending order."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = (values.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
        probs /= probs.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        probs[(probs.cumsum(-1) - probs) >= sampling.top_p] = 0
    index = _invert(probs, u * probs.sum(-1))
    return order.gather(1, index[:, None])[:, 0]


def _pick(wide: Tensor, tokens: Tensor, offset: int, group: dist.ProcessGroup | None, size: int) -> Tensor:
    local = tokens - offset
    inside = (local >= 0) & (local < wide.shape[1])
    own = wide.gather(1, local.clamp(0, wide.shape[1] - 1)[:, None])[:, 0].where(inside, wide.new_zeros(()))
    if size > 1:
        dist.all_reduce(own, group=group)
    return own


def _all_gather(mine: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    if size == 1:
        return mine[None]
    every = mine.new_empty(size * len(mine), mine.shape[1])
    dist.all_gather_into_tensor(every, mine.contiguous(), group=group)
    return every.view(size, *mine.shape)


def _full(x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    return _all_gather(x, group, size).transpose(0, 1).reshape(len(x), -1)
