"""Which tokens of a packed row a context-parallel rank holds. Pure functions.

Every sequence is padded to a multiple of 2 x cp tokens and cut into 2 x cp chunks of equal length; rank r holds the
chunks r and 2 x cp - 1 - r of every sequence, one after the other: under a causal mask all ranks have the same work.
This is how Transformer Engine splits packed (THD) sequences, and the layout of `prune.prefix_event_counts`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_length(tokens: int, size: int) -> int:
    """Tokens of a sequence once it can be split over `size` ranks; without a split nothing is padded."""
    return tokens if size == 1 else -(-tokens // (2 * size)) * 2 * size


def held_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two chunks, of 2 x `size`, that a rank holds."""
    return rank, 2 * size - 1 - rank


def held_positions(lengths: list[int], rank: int, size: int) -> Tensor:
    """[sum of lengths / size] int64: positions in the row of the tokens that a rank holds, in the order it has them.

    `lengths` are padded ones. Raises ValueError where one does not split.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    parts, at = [], 0
    for length in lengths:
        if length % (2 * size):
            raise ValueError(f"a sequence of {length} tokens does not split into {2 * size} equal chunks")
        chunk = length // (2 * size)
        parts += [torch.arange(at + n * chunk, at + (n + 1) * chunk) for n in held_chunks(rank, size)]
        at += length
    return torch.cat(parts)


def row_order(lengths: list[int], size: int) -> Tensor:
    """[sum of lengths] int64: for each position of the row, where it lies in all ranks' parts one behind the other."""
    return torch.cat([held_positions(lengths, rank, size) for rank in range(size)]).argsort()


def response_positions(prompt: int, response: int, rank: int, size: int) -> Tensor:
    """Positions of a response (0 for its first token) that a rank's tokens predict, in the order it has them.

    The sequence is the prompt and the response less its last token; a token predicts the one behind it.
    """
    fed = prompt + response - 1
    positions = held_positions([padded_length(fed, size)], rank, size)
    return positions[(positions >= prompt - 1) & (positions < fed)] - (prompt - 1)
