"""How far the student's next-token distribution has drifted from the teacher's, on vocab-parallel logits.

Everything is exact and the same for every tensor-parallel size: order by logit, ties to the lowest id. Ranks exchange
the values of their leading logits and one integer per token; ids never travel (see `losses/topk.py`). A NaN among a
token's logits gives that token NaN on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses.topk import LocalTop, check_k, members, share_topk, vocab_parallel_topk
from megatron_opd.losses.vocab_parallel import VocabShard, vocab_parallel_logprobs, vocab_shard

_PAIRS = 2**22  # id pairs compared at a time


def shared_ids(ids: Tensor, others: Tensor) -> Tensor:
    """Which of ids [tokens, n] occur in the same row of others [tokens, m]: bool [tokens, n]."""
    step = max(1, _PAIRS // max(1, ids.shape[1] * others.shape[1]))
    out = torch.empty(ids.shape, dtype=torch.bool, device=ids.device)
    for start in range(0, ids.shape[0], step):
        span = slice(start, start + step)
        out[span] = (ids[span, :, None] == others[span, None, :]).any(-1)
    return out


def _isin_top(ids: Tensor, top: LocalTop, shard: VocabShard) -> Tensor:
    """Which global ids [tokens, n] are in this rank's share of a model's top-k."""
    local = ids - shard.offset
    return shared_ids(torch.where(local < 0, -2, local), members(top, filler=-1))


def _check_tokens(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.shape[0] != logits.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} tokens, the logits have {logits.shape[0]}")


@torch.no_grad()
def topk_overlap(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Share of the student's k most likely tokens that are among the teacher's: docs/method.md item 1.

    student_logits, teacher_logits [tokens, vocab / tp]: this rank's columns of both models, any floating dtypes.
    group: the tensor-parallel group; None means that the logits are whole. Ids >= vocab_size are padding.
    Returns float32 [tokens] in 0..1, the same on every rank. Raises ValueError on shapes that differ or a k beyond the
    vocabulary.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits differ in shape: {list(student_logits.shape)} and {list(teacher_logits.shape)}")
    shard = vocab_shard(student_logits, group, vocab_size)
    student, teacher = share_topk([student_logits, teacher_logits], k, shard)
    shared = shared_ids(members(student, filler=-1), members(teacher, filler=-2)).sum(1, dtype=torch.int32)
    overlap = shard.sum(shared).to(torch.float32) / k
    return overlap.masked_fill_(student.invalid | teacher.invalid, torch.nan)


@torch.no_grad()
def count_shared(logits: Tensor, ids: Tensor, k: int, shard: VocabShard | None = None) -> Tensor:
    """How many of the given ids are among this model's own k most likely tokens, one integer per token on the wire.

    This is the teacher's half of the overlap where the student's logits are elsewhere: with `ids` the student's own
    top-k, `count_shared(...) / k` is `topk_overlap`.

    logits [tokens, vocab / tp]; ids [tokens, n] global ids, the same on every rank, those of a token all different; ids
    outside the vocabulary are in nothing.
    shard: this rank's part of the vocabulary; None means that the logits are whole and have no padding.
    Returns float32 [tokens], whole numbers, the same on every rank; NaN where the logits hold a NaN.
    """
    shard = shard or vocab_shard(logits)
    _check_tokens("ids", ids, logits)
    top = share_topk([logits], k, shard)[0]
    shared = shard.sum(_isin_top(ids, top, shard).sum(1, dtype=torch.int32))
    return shared.to(torch.float32).masked_fill_(top.invalid, torch.nan)


@torch.no_grad()
def teacher_top_p_accept(
    teacher_logits: Tensor,
    sampled_ids: Tensor,
    k: int,
    p: float = 0.95,
    shard: VocabShard | None = None,
) -> Tensor:
    """Whether the teacher accepts the sampled token: docs/method.md item 7, the alternative drift signal.

    The teacher accepts its p-nucleus inside its own top k: tokens in order of probability until their mass, over the
    full vocabulary, reaches p, the token that crosses p included; all k where they do not reach it. A drift event is a
    refusal.

    teacher_logits [tokens, vocab / tp]; sampled_ids [tokens] global ids; shard: see `count_shared`. Returns bool
    [tokens], the same on every rank. A token whose logits hold a NaN is refused. Raises ValueError for p not in (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p {p} must lie in (0, 1]")
    shard = shard or vocab_shard(teacher_logits)
    check_k(k, shard)
    _check_tokens("sampled_ids", sampled_ids, teacher_logits)
    ids = vocab_parallel_topk(teacher_logits, k, shard)[1]
    probabilities = vocab_parallel_logprobs(teacher_logits, ids, shard).exp()
    mass_before = probabilities.cumsum(1) - probabilities  # NaN is below nothing
    return ((ids == sampled_ids[:, None]) & (mass_before < p)).any(1)
