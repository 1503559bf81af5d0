"""Which part of the vocabulary a tensor-parallel rank holds, and the collectives over those parts.

Layout (Megatron's): rank r of a tensor-parallel group of size tp holds the columns [r * width, (r + 1) * width) of the
padded vocabulary, width = padded / tp, so the padding ids >= vocab_size are the last columns of the last ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary; `VocabShard.of` makes one from a layout, `vocab_shard` from logits."""

    group: dist.ProcessGroup | None  # the tensor-parallel group; None: the vocabulary is whole
    rank: int
    world: int
    width: int  # columns of this rank's logits, padding included
    vocab_size: int  # real ids, over all ranks

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, padded_size: int, vocab_size: int | None = None) -> VocabShard:
        """The shard of this rank where `group` splits `padded_size` columns evenly.

        vocab_size: ids from here on are padding; None: there is none. Raises ValueError where the sizes do not fit.
        """
        world = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not a member of the tensor-parallel group given")
        if padded_size % world:
            raise ValueError(f"{padded_size} columns do not split evenly over {world} ranks; pad the vocabulary")
        width = padded_size // world
        vocab_size = padded_size if vocab_size is None else vocab_size
        if not 0 < vocab_size <= padded_size:
            raise ValueError(f"vocab_size {vocab_size} must lie in 1..{padded_size}: {world} rank(s) x {width} columns")
        return cls(group, rank, world, width, vocab_size)

    @property
    def offset(self) -> int:
        """Global id of the first local column."""
        return self.rank * self.width

    def real_columns(self, rank: int | None = None) -> int:
        """How many of a rank's columns (default: this rank's) are real ids; they are its first ones."""
        start = (self.rank if rank is None else rank) * self.width
        return min(max(self.vocab_size - start, 0), self.width)

    def check(self, logits: Tensor) -> None:
        """Raises ValueError unless `logits` are floating [tokens, width]."""
        if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] != self.width:
            raise ValueError(
                f"logits must be floating [tokens, vocab / tp] with {self.width} columns, got {logits.dtype} "
                f"{list(logits.shape)}"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces in place, and returns, the sum over the ranks; without a group there is nothing to do."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gathers [..., n] of every rank as [..., tp, n]."""
        if self.world == 1:
            return tensor[..., None, :]
        parts = tensor.new_empty((self.world, *tensor.shape))
        dist.all_gather(list(parts.unbind()), tensor.contiguous(), group=self.group)
        return parts.movedim(0, -2)


def vocab_shard(logits: Tensor, group: dist.ProcessGroup | None = None, vocab_size: int | None = None) -> VocabShard:
    """The shard in `logits` [tokens, vocab / tp]; `vocab_size` None means that there is no padding.

    Raises ValueError where `logits` is not a floating matrix or `vocab_size` does not fit the ranks' columns.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [tokens, vocab / tp], got {logits.dtype} {list(logits.shape)}")
    return VocabShard.of(group, logits.shape[1] * (1 if group is None else dist.get_world_size(group)), vocab_size)
