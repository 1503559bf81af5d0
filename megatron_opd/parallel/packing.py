"""Which sequences go to which data-parallel rank, and how they share micro-batches. Pure functions.

Every rank computes the whole plan from the same lengths, so counts and shapes need no communication.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """`microbatches[d][m]` lists the sequences of data-parallel rank d's micro-batch m."""

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]


def attention_cost(tokens: int, quadratic_at: int = 8192) -> float:
    """Relative cost of one sequence: linear layers cost as much as attention at `quadratic_at` tokens."""
    return tokens + tokens * tokens / quadratic_at


def plan_microbatches(
    lengths: list[int],
    data_size: int,
    tokens_per_microbatch: int,
    pipeline: int = 1,
    multiple_of: int = 1,
    equal_counts: bool = False,
) -> Plan:
    """Balances sequences over data-parallel ranks by cost, then packs each rank's share by tokens.

    A rank gets as few micro-batches as `tokens_per_microbatch` allows, but at least `pipeline` where it has that many
    sequences (fewer would leave stages idle). Sequences of length 0 enter nowhere; a sequence longer than
    `tokens_per_microbatch` gets a micro-batch of its own.

    Args:
        lengths: tokens of each sequence, in the order of the global batch.
        data_size: data-parallel ranks.
        tokens_per_microbatch: most tokens of one micro-batch.
        pipeline: pipeline stages.
        multiple_of: micro-batch counts are rounded up to a multiple (interleaved schedule); short of sequences, empty
            micro-batches fill up.
        equal_counts: every data-parallel rank gets the same count (expert parallelism spans the ranks).
    """
    shares: list[list[int]] = [[] for _ in range(data_size)]
    heap = [(0.0, rank) for rank in range(data_size)]
    for index in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i)):
        cost, rank = heapq.heappop(heap)
        shares[rank].append(index)
        heapq.heappush(heap, (cost + attention_cost(lengths[index]), rank))

    def count_for(share: list[int]) -> int:
        tokens = sum(lengths[i] for i in share)
        count = max(min(max(math.ceil(tokens / tokens_per_microbatch), pipeline), len(share)), 1)  # none empty
        while len(share) > count and _fullest(_spread(share, lengths, count), lengths) > tokens_per_microbatch:
            count += 1
        return math.ceil(count / multiple_of) * multiple_of

    counts = [count_for(share) for share in shares]
    if equal_counts:
        counts = [max(counts)] * data_size
    return Plan(tuple(_spread(share, lengths, count) for share, count in zip(shares, counts)))


def _spread(share: list[int], lengths: list[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Longest first, each to the micro-batch with the fewest tokens; order within one by index."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for index in share:  # already longest first
        tokens, b = heapq.heappop(heap)
        bins[b].append(index)
        heapq.heappush(heap, (tokens + lengths[index], b))
    return tuple(tuple(sorted(b)) for b in bins)


def _fullest(bins: tuple[tuple[int, ...], ...], lengths: list[int]) -> int:
    """Tokens of the fullest micro-batch that holds more than one sequence."""
    return max((sum(lengths[i] for i in b) for b in bins if len(b) > 1), default=0)
