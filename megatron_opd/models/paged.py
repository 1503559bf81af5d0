"""Keys and values of running sequences, in blocks of tokens that go back to a common pool when a sequence ends.

The bytes held follow the tokens held: a sequence has at most one block that is not full, and the pool grows by a
thirty-second beyond what is needed. All layers use the same block numbers, so the table of whose a block is stands on
the host once, and no rank has to be asked for it: every rank of a pipeline makes the same calls.

With a limit, an engine promises a sequence its longest length before it begins (`promise`), so that none runs out of
room on its way; a teacher, which has to take what comes, moves sequences to host memory and back (`bring`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from megatron_opd.errors import OPDError

BLOCK = 32  # tokens
_SLACK = 32  # the pool grows by at least one part in so many


class CacheFull(OPDError):
    """More blocks are wanted than the limit leaves."""


def blocks_of(tokens: numpy.ndarray) -> numpy.ndarray:
    """Blocks that sequences of so many tokens take."""
    return -(-tokens // BLOCK)


class KVCache:
    """A pool of blocks for each layer: [2 (keys, values), blocks, BLOCK, kv heads / tp, head dim].

    Sequences are known by their slot, 0 to `slots` - 1; layers by their global, 1-based number. `limit` is the most
    blocks that may be held on the device at once (None: any number).
    """

    def __init__(self, slots: int, limit: int | None = None) -> None:
        self.slots, self.limit = slots, limit
        self.blocks = 0  # in each layer's pool, once the layer is used next
        self.held = numpy.zeros(slots, dtype=numpy.int64)  # [slots] blocks of each sequence on the device
        self.promised = numpy.zeros(slots, dtype=numpy.int64)  # [slots] blocks that each sequence may come to hold
        self._table = numpy.zeros((slots, 8), dtype=numpy.int64)  # [slots, widest] their numbers, in order
        self._free: list[int] = []
        self._pools: dict[int, Tensor] = {}
        self._parked: dict[int, tuple[int, dict[int, Tensor]]] = {}  # slot -> blocks, and each layer's copy of them

    @property
    def room(self) -> int | None:
        """Blocks that may still be taken; None without a limit."""
        return None if self.limit is None else self.limit - int(self.held.sum())

    @property
    def nbytes(self) -> int:
        """Device bytes of all pools."""
        return sum(pool.nbytes for pool in self._pools.values())

    def missing(self, slots: Sequence[int] | numpy.ndarray, lengths: Sequence[int] | numpy.ndarray) -> int:
        """Blocks that these sequences lack for so many tokens each."""
        return int((blocks_of(numpy.asarray(lengths)) - self.held[numpy.asarray(slots)]).clip(min=0).sum())

    def reserve(self, slots: Sequence[int] | numpy.ndarray, lengths: Sequence[int] | numpy.ndarray) -> None:
        """Gives these sequences blocks for so many tokens each. Raises CacheFull where the limit does not allow it."""
        missing = self.missing(slots, lengths)
        if not missing:
            return
        if self.room is not None and missing > self.room:
            raise CacheFull(f"{missing} more blocks are wanted, {self.room} of {self.limit} are left")
        lacking = missing - len(self._free)
        if lacking > 0:
            grown = self.blocks + max(lacking, self.blocks // _SLACK)
            if self.limit is not None:
                grown = max(self.blocks + lacking, min(grown, self.limit))
            self._free[:0] = range(grown - 1, self.blocks - 1, -1)
            self.blocks = grown
        needed = blocks_of(numpy.asarray(lengths))
        if int(needed.max()) > self._table.shape[1]:
            widened = max(int(needed.max()), 2 * self._table.shape[1])
            self._table = numpy.pad(self._table, ((0, 0), (0, widened - self._table.shape[1])))
        for i in numpy.flatnonzero(needed > self.held[numpy.asarray(slots)]).tolist():
            slot, wanted = int(slots[i]), int(needed[i])
            for column in range(int(self.held[slot]), wanted):
                self._table[slot, column] = self._free.pop()
            self.held[slot] = wanted

    def release(self, slot: int) -> None:
        """The sequence has ended: its blocks, or its copy in host memory, are free."""
        self._parked.pop(slot, None)
        self._vacate(slot)
        self.promised[slot] = 0

    def _vacate(self, slot: int) -> None:
        self._free += self._table[slot, : self.held[slot]].tolist()[::-1]
        self.held[slot] = 0

    def promise(self, slot: int, tokens: int) -> bool:
        """Whether a new sequence of up to so many tokens fits beside what has been promised; if so, it is promised."""
        wanted = -(-tokens // BLOCK)
        if self.limit is not None and int(self.promised.sum()) + wanted > self.limit:
            return False
        self.promised[slot] = wanted
        return True

    def move(self, slot: int, to: int) -> None:
        """Sequence `slot` is known as `to` from now on, a slot without blocks; nothing is copied."""
        self._table[to], self._table[slot] = self._table[slot], self._table[to].copy()
        for counts in (self.held, self.promised):
            counts[to], counts[slot] = counts[slot], 0

    def bring(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Makes room for so many tokens of each of these sequences and has them on the device; others wait in host
        memory where there is no room for all."""
        if self.limit is None:
            return
        others = [int(p) for p in numpy.flatnonzero(self.held) if p not in slots]
        while self.missing(slots, lengths) > self.limit - int(self.held.sum()) and others:
            self.park(others.pop())
        for slot in slots:
            if slot in self._parked:
                self.resume(slot)

    def park(self, slot: int) -> None:
        """Moves the sequence's keys and values to host memory and frees its blocks."""
        count = int(self.held[slot])
        if not count:
            return
        copies = {}
        for number, pool in self._pools.items():
            blocks = torch.from_numpy(self._table[slot, :count]).to(pool.device)
            part = pool[:, blocks]
            copies[number] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            copies[number].copy_(part, non_blocking=True)  # whatever overwrites the blocks runs behind it
        self._vacate(slot)
        self._parked[slot] = (count, copies)

    def resume(self, slot: int) -> None:
        """Brings a parked sequence back. Raises CacheFull where the limit does not allow it."""
        count, copies = self._parked[slot]
        self.reserve([slot], [count * BLOCK])
        del self._parked[slot]
        for number, copy in copies.items():
            pool = self._pools[number]
            pool = self.pool(number, pool[0, 0])
            blocks = torch.from_numpy(self._table[slot, :count]).to(pool.device)
            pool[:, blocks] = copy.to(pool.device, non_blocking=True)

    def pool(self, number: int, like: Tensor) -> Tensor:
        """A layer's pool; made on first use with the dtype, heads and head size of `like` [T, kv heads, head dim]."""
        pool = self._pools.get(number)
        have = 0 if pool is None else pool.shape[1]
        if pool is None or have < self.blocks:
            grown = like.new_empty(2, self.blocks, BLOCK, *like.shape[1:])
            grown[:, have:] = 0  # masked positions are multiplied by 0, so they must be finite
            if pool is not None:
                grown[:, :have] = pool
            self._pools[number] = pool = grown
        return pool

    def table(self, slots: Sequence[int] | numpy.ndarray, tokens: int) -> numpy.ndarray:
        """[B, blocks of `tokens`] block numbers; what lies behind a sequence's own blocks names any block."""
        return self._table[numpy.asarray(slots), : -(-tokens // BLOCK)]

    def addresses(self, slots: numpy.ndarray, positions: numpy.ndarray) -> numpy.ndarray:
        """[T] where in a pool, seen as one line of tokens, each position of its sequence lies; both arguments [T]."""
        return self._table[slots, positions // BLOCK] * BLOCK + positions % BLOCK
