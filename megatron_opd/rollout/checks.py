"""What an engine of one's own has returned; the package's engines have tests instead."""

from __future__ import annotations

import zlib

from megatron_opd.parallel.collective import all_gather, rank_and_size, together
from megatron_opd.rollout.base import Request, RolloutError, Sampling
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, Rollout


def check_rollouts(rollouts: list[Rollout], requests: list[Request], sampling: Sampling, vocab_size: int) -> None:
    """One whole response for each request, in their order, and the same ones on every rank.

    Collective. Raises RolloutError on every rank where one rank has something else.
    """
    with together():
        if [r.index for r in rollouts] != [r.index for r in requests]:
            raise RolloutError(
                f"the engine returned responses {[r.index for r in rollouts]} to requests {[r.index for r in requests]}"
            )
        for r in rollouts:
            if problem := _problem(r, sampling, vocab_size):
                raise RolloutError(f"the engine's response {r.index} {problem}")
    sums = [zlib.crc32(r.tokens.numpy().tobytes() + r.logprobs.numpy().tobytes()) for r in rollouts]
    for rank, others in enumerate(all_gather(sums)):
        if others != sums:
            where = next(r.index for r, one, other in zip(rollouts, sums, others) if one != other)
            raise RolloutError(
                f"the engine's response {where} on rank {rank} is not that on rank {rank_and_size()[0]}: generate must "
                "return all responses on every rank, and the same ones"
            )


def _problem(r: Rollout, sampling: Sampling, vocab_size: int) -> str:
    tokens, table = len(r), [len(r), sampling.top_logprobs]
    if not 0 < tokens <= sampling.max_tokens:
        return f"has {tokens} tokens, not 1 to {sampling.max_tokens}"
    for name, column, shape in (
        ("logprobs", r.logprobs, [tokens]),
        ("topk_ids", r.topk_ids, table),
        ("topk_logprobs", r.topk_logprobs, table),
    ):
        if list(column.shape) != shape:
            return f"has {name} of shape {list(column.shape)}, not {shape}"
    least, most = int(r.tokens.min()), int(r.tokens.max())
    if least < 0 or most >= vocab_size:
        return f"holds the id {least if least < 0 else most}, outside the models' 0 to {vocab_size - 1}"
    if r.end_reason not in (END_EOS, END_LENGTH, END_DRIFT):
        return f"has end_reason {r.end_reason!r}, not {END_EOS}, {END_LENGTH} or {END_DRIFT}"
    return ""
