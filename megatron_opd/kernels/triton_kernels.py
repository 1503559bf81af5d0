"""The Triton kernels behind stats.py and backward.py, which import this module when one first runs.

Statistics, one program per row (or per part of a row): a row is read in tiles [LANES, 8]; lane l of every tile forms
group l. Each group keeps its maximum, where that first occurred, and its own online sum of exponentials, all in
registers, so that a tile costs one reduction within a thread and no exchange between threads. The K largest columns lie
in the K groups whose maxima are largest (ties to the lowest column), so at the end those groups alone, a few percent of
the row, are read again and sorted. Keys of a sort hold value and position in one integer: the order is total and the
result exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 8  # neighbouring columns of a lane: 16 bytes of bfloat16
_CHUNK = tl.constexpr(CHUNK)
_LOW = tl.constexpr(-1.0e30)  # a shift instead of -inf, which must not be subtracted from itself
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _ordered_key(value, position, WIDE: tl.constexpr):
    """An integer that sorts as (value, then lower position first); `value` in its own dtype, 0 <= position.

    32 bits where values have 16 bits and positions below 2^16 (not WIDE), 64 bits otherwise.
    """
    if WIDE:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        bits = tl.where(bits == -(2**31), 0, bits)  # -0.0 equals 0.0
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats as the order of signed integers
        return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(bits == -(2**15), 0, bits)
        bits = bits ^ ((bits >> 15) & 0x7FFF)
        return (bits << 16) | (0xFFFF - position)


@triton.jit
def _position(key, WIDE: tl.constexpr):
    if WIDE:
        return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
    else:
        return 0xFFFF - (key & 0xFFFF)


@triton.jit
def _value(key, dtype: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        bits = (key >> 32).to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True).to(dtype)
    else:
        bits = key >> 16
        return (bits ^ ((bits >> 15) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _pick(values, index, SIZE: tl.constexpr):
    """values[index] of [SIZE] each."""
    return tl.sum(tl.where(index[:, None] == tl.arange(0, SIZE)[None, :], values[None, :], 0), axis=1)


@triton.jit
def _read(logits, column, real, readable):
    """Logits in float32, -inf from `real` on; `readable` >= real keeps the loads whole."""
    x = tl.load(logits + column, mask=column < readable, other=float("-inf")).to(tl.float32)
    return tl.where(column < real, x, float("-inf"))


@triton.jit
def _take_in(x, tile, top, first, total):
    """A tile x [LANES, 8] float32 into the groups' maxima, the tile of their first occurrence, and their sums."""
    highest = tl.max(x, axis=1)
    first = tl.where(highest > top, tile, first)
    new = tl.maximum(top, highest)
    before, after = tl.maximum(top, _LOW), tl.maximum(new, _LOW)
    scale = tl.full((), _LOG2_E, tl.float32)
    part = tl.sum(tl.exp2(tl.fma(x, scale, -(after * scale)[:, None])), axis=1)
    return new, first, total * tl.exp2((before - after) * scale) + part


@triton.jit(do_not_specialize=["parts", "tiles", "n"])
def stats_kernel(
    logits,
    token_stride,
    real,
    readable,
    parts,
    tiles,
    ids,
    n,
    lse,
    top_values,
    top_ids,
    at_ids,
    invalid,
    LANES: tl.constexpr,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    DEPTH: tl.constexpr,
    IDS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_POSITIONS: tl.constexpr,
):
    """Program p has part p % parts of token p // parts: `tiles` tiles of LANES x 8 columns. Results: [tokens * parts].

    Columns below `real` count; those below `readable` may be read (a multiple of 16 where it can be, so that loads stay
    whole). KEPT: K rounded up to a power of two, 0 for no top-k; DEPTH: `tiles` likewise. IDS: n likewise.
    """
    program = tl.program_id(0).to(tl.int64)
    part = (program % parts).to(tl.int32)
    token = program // parts
    logits += token * token_stride
    dtype: tl.constexpr = logits.dtype.element_ty
    base = part * tiles * LANES * _CHUNK
    lane = tl.arange(0, LANES)
    within = lane[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]

    top = tl.full([LANES], float("-inf"), tl.float32)
    first = tl.zeros([LANES], tl.int32)
    total = tl.zeros([LANES], tl.float32)
    whole = tl.minimum(tl.maximum(real - base, 0) // (LANES * _CHUNK), tiles)
    for tile in range(0, whole):
        x = tl.load(logits + base + tile * LANES * _CHUNK + within).to(tl.float32)
        top, first, total = _take_in(x, tile, top, first, total)
    if whole < tiles:
        x = _read(logits, base + whole * LANES * _CHUNK + within, real, readable)
        top, first, total = _take_in(x, whole, top, first, total)

    highest = tl.maximum(tl.max(top, axis=0), _LOW)
    summed = tl.sum(total * tl.exp2((tl.maximum(top, _LOW) - highest) * _LOG2_E), axis=0)
    tl.store(lse + program, highest + tl.log(summed))
    nans = tl.full((), 0, tl.int32)
    if summed != summed:  # a NaN or +inf among the logits: rare enough to look again
        for tile in range(0, tiles):
            column = base + tile * LANES * _CHUNK + within
            x = tl.load(logits + column, mask=column < real, other=0.0).to(tl.float32)
            nans += tl.sum((x != x).to(tl.int32))
    tl.store(invalid + program, (nans > 0).to(tl.int8))

    if IDS > 0:
        if part == 0:
            slot = tl.arange(0, IDS)
            wanted = tl.load(ids + token * n + slot, mask=slot < n, other=-1)
            owned = (wanted >= 0) & (wanted < real)
            x = tl.load(logits + wanted, mask=owned, other=0.0).to(tl.float32)
            tl.store(at_ids + token * n + slot, x, mask=slot < n)

    if KEPT > 0:
        # The groups whose maxima are largest, in the order of their lanes.
        if WIDE_POSITIONS:
            groups = tl.topk(_ordered_key(top, first * LANES + lane, True), KEPT)
        else:
            groups = tl.topk(_ordered_key(top.to(dtype), first * LANES + lane, False), KEPT)
        lanes = tl.sort(_position(groups, WIDE_POSITIONS) % LANES)
        # Of their chunks of 8 columns, in the order of the columns, [DEPTH, KEPT], those whose maxima are largest.
        slot = tl.arange(0, KEPT)
        offset = tl.arange(0, _CHUNK)
        depth = tl.arange(0, DEPTH)[:, None]
        begin = base + (depth * LANES + lanes[None, :]) * _CHUNK
        x = _read(logits, begin[:, :, None] + offset[None, None, :], real, readable)
        lowest = tl.full([1], -(2**63), tl.int64) if WIDE else tl.full([1], -(2**31), tl.int32)
        key = _ordered_key(tl.max(x, axis=2).to(dtype), depth * KEPT + slot[None, :], WIDE)
        key = tl.where((depth < tiles) & (begin < real), key, lowest)
        chunks = tl.topk(tl.reshape(key, [DEPTH * KEPT]), KEPT)
        chunk = tl.sort(tl.where(chunks == lowest, DEPTH * KEPT, _position(chunks, WIDE)))
        # Of their columns the largest. A part, not a row, may have fewer than K.
        begin = base + ((chunk // KEPT) * LANES + _pick(lanes, chunk % KEPT, KEPT)) * _CHUNK
        begin = tl.where(chunk < DEPTH * KEPT, begin, real)
        column = begin[:, None] + offset[None, :]
        x = _read(logits, column, real, readable)
        key = _ordered_key(x.to(dtype), slot[:, None] * _CHUNK + offset[None, :], WIDE)
        best = tl.topk(tl.reshape(tl.where(column < real, key, lowest), [KEPT * _CHUNK]), KEPT)
        position = _position(best, WIDE)
        column = _pick(begin, position // _CHUNK % KEPT, KEPT) + position % _CHUNK
        value = tl.where(best == lowest, float("-inf"), _value(best, dtype, WIDE))
        tl.store(top_values + program * K + slot, value, mask=slot < K)
        tl.store(top_ids + program * K + slot, tl.minimum(column, real - 1).to(tl.int64), mask=slot < K)


@triton.jit(do_not_specialize=["blocks", "tiles", "n"])
def backward_kernel(
    logits,
    token_stride,
    grad,
    grad_stride,
    log_z,
    ids,
    slope,
    n,
    real,
    width,
    blocks,
    tiles,
    TILE: tl.constexpr,
    IDS: tl.constexpr,
):
    """Program p has block p % blocks, of tiles x TILE columns, of token p // blocks; `grad` may be `logits`."""
    program = tl.program_id(0).to(tl.int64)
    begin = (program % blocks).to(tl.int32) * (tiles * TILE)
    token = program // blocks
    logits += token * token_stride
    grad += token * grad_stride
    slot = tl.arange(0, IDS)
    upstream = tl.load(slope + token * n + slot, mask=slot < n, other=0.0).to(tl.float32)
    total = tl.sum(upstream, axis=0)
    pruned = tl.sum((upstream != 0).to(tl.int32), axis=0) == 0  # its logits may hold anything
    normaliser = tl.load(log_z + token)

    # The logits at the ids of this block, before they are overwritten.
    wanted = tl.load(ids + token * n + slot, mask=slot < n, other=-1)
    owned = (wanted >= begin) & (wanted < begin + tiles * TILE) & (wanted < real)
    chosen = tl.load(logits + wanted, mask=owned, other=0.0).to(tl.float32)
    same = wanted[:, None] == wanted[None, :]  # an id that occurs twice receives both
    own = tl.sum(tl.where(same, upstream[None, :], 0.0), axis=1)
    chosen = own - total * tl.exp(chosen - normaliser)
    tl.debug_barrier()

    for tile in range(0, tiles):
        column = begin + tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
        value = -total * tl.exp(x - normaliser)
        value = tl.where((column < real) & (not pruned), value, 0.0)
        tl.store(grad + column, value.to(grad.dtype.element_ty), mask=column < width)

    tl.debug_barrier()
    tl.store(grad + wanted, tl.where(pruned, 0.0, chosen).to(grad.dtype.element_ty), mask=owned)
