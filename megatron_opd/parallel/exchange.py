"""Moving per-sequence results from the ranks that own them to every rank."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.parallel.context import response_positions
from megatron_opd.parallel.groups import Layout

Fields = dict[str, Tensor]
Key = TypeVar("Key", bound=Hashable)


def share_responses(
    items: Sequence[tuple[int, Fields]],
    layout: Layout,
    device: torch.device,
    lengths: Sequence[tuple[int, int]],
    once: Sequence[str] = (),
) -> list[Fields]:
    """Every rank gets every response's columns, one value per response token, in the order of the response.

    Args:
        items: (number of the response, fields) of the rows that this rank has computed, ignored where it does not own
            results. Under context parallelism a rank's fields are of the response tokens that its part of the row
            predicts, in the order of the row; all ranks of the group have an item for the response.
        lengths: tokens of prompt and of response, of every response.
        once: fields that are of a whole response, not of its tokens; the same on all context-parallel ranks.
    """
    rank, size = layout.context
    shared = share_fields([((i, rank), fields) for i, fields in items], layout.owns_results, device)
    shared_items = []
    for i, (prompt, response) in enumerate(lengths):
        parts = [shared[i, r] for r in range(size)]
        order = torch.cat([response_positions(prompt, response, r, size) for r in range(size)]).argsort()
        shared_items.append(
            {n: parts[0][n] if n in once else torch.cat([part[n] for part in parts])[order] for n in parts[0]}
            if size > 1
            else parts[0]
        )
    return shared_items


def share_fields(
    items: Sequence[tuple[Key, Fields]], owner: bool, device: torch.device, group: dist.ProcessGroup | None = None
) -> dict[Key, Fields]:
    """Every rank gets every owner's items: {key: {field: tensor}}.

    Fields of one name are concatenated along dimension 0, so an owner's part travels as one broadcast per field;
    memory is the sum of what is shared, whatever the number of ranks. int64 travels as int32 (token ids, lengths).

    Args:
        items: this rank's (key, fields), ignored where not `owner`. All items have the same fields.
        owner: whether this rank's items count; exactly one rank must own each key.
        device: where `group` (None: the world) communicates; results are on the CPU.
    """
    world = dist.get_world_size(group)
    mine: list[tuple[Key, dict[str, tuple[tuple[int, ...], str]]]] | None = None
    if owner:
        mine = [(k, {n: (tuple(t.shape), str(t.dtype)) for n, t in f.items()}) for k, f in items]
    headers: list[list | None] = [None] * world
    dist.all_gather_object(headers, mine, group=group)
    shared_items: dict[Key, Fields] = {}
    for rank, header in enumerate(headers):
        if not header:
            continue
        names = list(header[0][1])
        parts: dict[str, Sequence[Tensor]] = {}
        for name in names:
            shapes = [h[1][name][0] for h in header]
            dtype = getattr(torch, header[0][1][name][1].removeprefix("torch."))
            wire = torch.int32 if dtype == torch.int64 else torch.uint8 if dtype == torch.bool else dtype
            if rank == dist.get_rank(group):
                flat = torch.cat([f[name] for _, f in items]).to(device, wire).contiguous()
            else:
                total = sum(s[0] for s in shapes)
                flat = torch.empty((total, *shapes[0][1:]), dtype=wire, device=device)
            if world > 1 and flat.numel():
                dist.broadcast(flat, group=group, group_src=rank)
            parts[name] = flat.to("cpu", dtype).split([s[0] for s in shapes])
        for i, (key, _) in enumerate(header):
            shared_items[key] = {name: parts[name][i] for name in names}
    return shared_items
