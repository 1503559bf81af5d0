"""Writes a torch_dist checkpoint of Megatron-Core in three acts, so that the slow one can run in the background.

plan     all ranks agree on who writes what; collective, once per run, because the layout does not change
write    each rank writes its file; no communication, so a thread can do it while training goes on
finish   rank 0 writes the metadata from what all ranks report
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.compat.dist_checkpointing import (
    Entries,
    Metadata,
    SavePlan,
    WriteItem,
    WriteResult,
    agree_on_plan,
    file_name,
    save_planner,
    write_metadata,
    write_shards,
)


class ShardWriter:
    """Writes the same tensors again and again, each time into another directory."""

    def __init__(self) -> None:
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None  # on rank 0, once there is a plan
        self._host: list[Tensor] = []  # copies that the background writes from, kept for the next save

    def prepare(self, entries: Entries, copy_to_host: bool) -> list[tuple[WriteItem, Tensor]]:
        """What this rank writes. Collective the first time.

        With `copy_to_host` the tensors are copied, so that training may change the originals while they are written.
        """
        planner = save_planner(entries, is_coordinator=dist.get_rank() == 0)
        if self._plan is None:
            self._plan, self._metadata = agree_on_plan(planner)
        items = [(item, planner.resolve_data(item)) for item in self._plan.items]
        return self._copied(items) if copy_to_host else items

    def write(self, items: list[tuple[WriteItem, Tensor]], directory: Path) -> list[WriteResult]:
        """Writes this rank's file and returns when it is on disk. Needs no other rank. Raises OSError."""
        return write_shards(directory, file_name(dist.get_rank()), items) if items else []

    def finish(self, results: list[list[WriteResult]], directory: Path) -> None:
        """Rank 0: writes the metadata of all ranks' results. Raises OSError."""
        assert self._metadata is not None  # prepare() has made it here
        write_metadata(directory, self._metadata, results)

    def _copied(self, items: list[tuple[WriteItem, Tensor]]) -> list[tuple[WriteItem, Tensor]]:
        tensors = [tensor for _, tensor in items]
        if not self._host:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        for target, tensor in zip(self._host, tensors, strict=True):
            target.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return [(item, host) for (item, _), host in zip(items, self._host, strict=True)]
