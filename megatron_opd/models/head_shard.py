"""The teacher's output layer, split as the student's vocabulary is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.models.headless import head_parameter
from megatron_opd.models.model import Model


def head_shard(teacher: Model, student: Model) -> Tensor | None:
    """[student's vocab / tp, teacher's hidden size] on the ranks of the student's last stage, None elsewhere.

    Rows of ids that the teacher lacks are 0; they are padding to both models. Both layouts lie over the same ranks, and
    one of the teacher's shards travels at a time. Collective over all ranks.
    """
    layout = teacher.layout
    owns = layout.is_last_stage and layout.replica == 0
    holders: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(holders, layout.groups.tp.rank() if owns else None)
    width = teacher.padded_vocab_size // layout.parallel.tensor
    mine = head_parameter(teacher).detach() if owns else None
    shape = (width, teacher.config.hidden_size)
    shard, result = student.vocab_shard, None
    if student.layout.is_last_stage:
        result = torch.zeros((shard.width, shape[1]), dtype=teacher.config.params_dtype, device=teacher.device)
    for rank, holder in enumerate(holders):
        if holder is None:
            continue
        if mine is not None and rank == dist.get_rank():
            part = mine.to(teacher.device).contiguous()
        else:
            part = torch.empty(shape, dtype=teacher.config.params_dtype, device=teacher.device)
        dist.broadcast(part, rank)
        if result is not None:
            begin, end = max(holder * width, shard.offset), min((holder + 1) * width, shard.offset + shard.width)
            end = min(end, teacher.vocab_size)
            if begin < end:
                result[begin - shard.offset : end - shard.offset] = part[begin - holder * width : end - holder * width]
    return result
