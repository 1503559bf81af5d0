"""Exact top-k of the rows of a 16-bit matrix on a CPU, by numpy's integer maxima: no row is widened or sorted.

A float's bits, read as int16, sort as the float does where it is positive and in reverse where it is negative. Every
row is cut into interleaved groups of `_LANES` ids. The k-th largest group maximum bounds the k-th largest value from
below, so what is not below it, a few more than k entries, holds the whole top-k, ties included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LANES = 64  # ids of a group: near sqrt(shard / k) at 38k ids and k 16
_TOKENS = 64  # taken together: enough to spread numpy's cost per call, few enough for the last level of cache
_CACHED_TOKENS = 2  # reduced twice while they are in the cache
_CROWDED = 4  # groups per wanted entry beyond which ties are so many that another way is cheaper
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # bits; a NaN's are beyond


def _indices(mask: np.ndarray) -> np.ndarray:
    """np.flatnonzero of a large, mostly false mask: eight entries at a time first."""
    flat = mask.ravel()
    even = flat.size & -8
    words = np.flatnonzero(flat[:even].view(np.int64))
    word, byte = np.nonzero(flat[:even].reshape(-1, 8)[words])
    return np.concatenate([words[word] * 8 + byte, even + np.flatnonzero(flat[even:])])


def _keys(bits: np.ndarray) -> np.ndarray:
    """int16 that sort as the floats with these bits; -0.0 equals 0.0."""
    keys = bits ^ ((bits >> 15) & 0x7FFF)
    return np.where(keys == -1, np.int16(0), keys)


def _at_least(bits: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Flat positions of the entries of bits [tokens, n] that are not below their row's key bound [tokens]."""
    return _indices((bits if bound.min() > 0 else _keys(bits)) >= bound[:, None])


def _lanes(bits: np.ndarray, groups: int) -> np.ndarray:
    """bits [tokens, n] as [tokens, _LANES, groups]: id = lane * groups + group. What is left of n is the tail."""
    return bits[:, : groups * _LANES].reshape(-1, _LANES, groups)


def _group_maxima(bits: np.ndarray, groups: int, infinity: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [tokens, groups] of the groups' maxima, and [tokens] whether a NaN is among bits [tokens, n]."""
    tokens = bits.shape[0]
    maxima, largest = np.empty((tokens, groups), np.int16), np.empty(tokens, np.uint16)
    for start in range(0, tokens, _CACHED_TOKENS):
        piece = slice(start, start + _CACHED_TOKENS)
        np.maximum.reduce(_lanes(bits[piece], groups), axis=1, out=maxima[piece])
        np.maximum.reduce(bits[piece].view(np.uint16), axis=1, out=largest[piece])
    invalid = (maxima.max(1) > infinity) | (largest > 0x8000 + infinity)  # a positive NaN, a negative one
    if maxima.min() < 0:  # groups without a positive: their largest float has the smallest bits
        maxima = np.where(maxima < 0, np.minimum.reduce(_lanes(bits, groups), axis=1) ^ 0x7FFF, maxima)
        maxima[maxima == -1] = 0
    return maxima, invalid


def _topk_tokens(bits: np.ndarray, k: int, infinity: int) -> tuple[np.ndarray, np.ndarray] | None:
    tokens, n = bits.shape
    groups = n // _LANES
    tail = bits[:, groups * _LANES :]
    maxima, invalid = _group_maxima(bits, groups, infinity)
    invalid |= ((tail & 0x7FFF) > infinity).any(1)
    # numpy selects among int32 several times as fast as among int16
    bound = np.partition(maxima.astype(np.int32), groups - k, axis=1)[:, groups - k].astype(np.int16)
    token, group = np.divmod(_indices(maxima >= bound[:, None]), groups)
    if token.size > _CROWDED * k * tokens:
        return None
    entries = _lanes(bits, groups)[token, :, group]
    hits = _at_least(entries, bound[token])
    entry = hits // _LANES
    ids = hits % _LANES * groups + group[entry]
    values, owners = entries.ravel()[hits], token[entry]
    if tail.size:
        hits = _at_least(tail, bound)
        owners = np.concatenate([owners, hits // tail.shape[1]])
        ids = np.concatenate([ids, hits % tail.shape[1] + groups * _LANES])
        values = np.concatenate([values, tail.ravel()[hits]])
    order = (owners << 48) | ((0x7FFF - _keys(values).astype(np.int64)) << 32) | ids  # row, then value, then id
    order.sort()
    counts = np.bincount(owners, minlength=tokens)
    first = np.cumsum(counts) - counts
    return order[first[:, None] + np.arange(k)] & 0xFFFFFFFF, invalid


def numpy_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest of each row of bf16 or fp16 logits [tokens, n] on the CPU, best first, ties to the lowest id.

    Returns ids [tokens, k] int64 and whether a NaN was seen, [tokens] bool; None where this way does not pay: a row of
    fewer than 2 k groups, or rows full of ties.
    """
    if logits.shape[1] // _LANES < 2 * k:
        return None
    bits, parts = logits.detach().view(torch.int16).numpy(), []
    for start in range(0, logits.shape[0], _TOKENS):
        part = _topk_tokens(bits[start : start + _TOKENS], k, _INFINITY[logits.dtype])
        if part is None:
            return None
        parts.append(part)
    ids, invalid = (np.concatenate(column) for column in zip(*parts))
    return torch.from_numpy(ids), torch.from_numpy(invalid)
