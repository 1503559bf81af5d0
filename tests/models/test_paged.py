"""Blocks of keys and values: what is allocated follows what is held, and what is held comes back bit by bit."""

from __future__ import annotations

import numpy
import pytest
import torch

from megatron_opd.models.paged import BLOCK, CacheFull, KVCache

HEADS, DIM, LAYERS = 2, 4, 3
TOKEN_BYTES = 2 * HEADS * DIM * 4  # of one layer, keys and values in fp32


def write(cache: KVCache, slot: int, start: int, tokens: torch.Tensor) -> None:
    """Caches `tokens` [T, HEADS, DIM] behind `start` others, in every layer another multiple of them."""
    end = start + len(tokens)
    cache.bring([slot], [end])
    cache.reserve([slot], [end])
    addresses = torch.from_numpy(cache.addresses(numpy.full(len(tokens), slot), numpy.arange(start, end)))
    for layer in range(LAYERS):
        pool = cache.pool(layer, tokens).flatten(1, 2)
        pool[0, addresses], pool[1, addresses] = tokens * (layer + 1), -tokens * (layer + 1)


def read(cache: KVCache, slot: int, layer: int, tokens: int) -> torch.Tensor:
    cache.bring([slot], [tokens])
    blocks = torch.from_numpy(cache.table([slot], tokens)[0])
    pool = cache.pool(layer, torch.empty(0, HEADS, DIM))
    return pool[:, blocks].flatten(1, 2)[:, :tokens]


def test_peak_bytes_follow_the_live_tokens_within_a_tenth():
    generator = numpy.random.default_rng(0)
    final = generator.integers(BLOCK, 60 * BLOCK, 48)
    lengths, cache, peak = numpy.zeros(48, dtype=int), KVCache(48), 0  # peak: tokens
    while (running := numpy.flatnonzero(lengths < final)).size:
        for slot in running.tolist():
            step = min(int(generator.integers(1, 2 * BLOCK)), int(final[slot] - lengths[slot]))
            write(cache, slot, int(lengths[slot]), torch.ones(step, HEADS, DIM))
            lengths[slot] += step
        assert int(cache.held.sum()) == int((-(-lengths[running] // BLOCK)).sum())
        peak = max(peak, int(lengths[running].sum()))
        for slot in running[lengths[running] == final[running]].tolist():
            cache.release(slot)
    storages = sum(cache.pool(n, torch.empty(0, HEADS, DIM)).untyped_storage().nbytes() for n in range(LAYERS))
    assert peak * TOKEN_BYTES * LAYERS <= storages <= 1.1 * peak * TOKEN_BYTES * LAYERS
    assert cache.nbytes == storages and not cache.held.any()


def test_sequences_that_wait_in_host_memory_come_back_bit_by_bit():
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(5 * BLOCK - n, HEADS, DIM, generator=generator) for n in range(6)]
    cache = KVCache(6, limit=11)
    for start in range(0, 5 * BLOCK, 50):  # two of six fit at their longest
        for slot, tokens in enumerate(whole):
            write(cache, slot, start, tokens[start : start + 50])
            assert int(cache.held.sum()) <= cache.blocks <= 11
    for slot, tokens in enumerate(whole):
        for layer in range(LAYERS):
            keys, values = read(cache, slot, layer, len(tokens))
            assert torch.equal(keys, tokens * (layer + 1)) and torch.equal(values, -keys)


def test_a_moved_sequence_keeps_its_blocks():
    cache = KVCache(3)
    tokens = torch.arange(40.0 * HEADS * DIM).view(40, HEADS, DIM)
    write(cache, 0, 0, tokens)
    write(cache, 2, 0, tokens + 7)
    cache.release(0)
    cache.move(2, 0)
    assert torch.equal(read(cache, 0, 1, 40)[0], 2 * (tokens + 7))
    write(cache, 2, 0, tokens)
    assert torch.equal(read(cache, 0, 1, 40)[0], 2 * (tokens + 7)) and cache.blocks == 4


def test_promises_and_blocks_end_at_the_limit():
    cache = KVCache(3, limit=4)
    assert cache.promise(0, 2 * BLOCK) and not cache.promise(1, 2 * BLOCK + 1) and cache.promise(1, 2 * BLOCK)
    assert not cache.promise(2, 1)
    cache.release(0)
    assert cache.promise(2, 1)
    with pytest.raises(CacheFull, match="5 more blocks are wanted, 4 of 4 are left"):
        write(cache, 0, 0, torch.ones(4 * BLOCK + 1, HEADS, DIM))
