"""Writes a torch_dist checkpoint of Megatron-Core in three acts, so that the slow one can run in the background.

    plan     all ranks agree on who writes what; collective, once per run, because the layout does not change
    write    each rank writes its file; no communication, so a thread can do it while training goes on
    finish   rank 0 writes the metadata from what all ranks report

Private names of Megatron-Core and torch are used in this module alone (and in `weights/converted.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_opd.checkpoint.shards import Entries
from megatron_opd.weights.converted import write_shards

_COMMON = "common.pt"  # Megatron-Core reads it; what others put there is in our state.json


class ShardWriter:
    """Writes the same tensors again and again, each time into another directory."""

    def __init__(self) -> None:
        self._plan: Any = None
        self._metadata: Any = None  # on rank 0
        self._host: list[Tensor] = []  # copies that the background writes from, kept for the next save

    def prepare(self, entries: Entries, copy_to_host: bool) -> list[tuple[WriteItem, Tensor]]:
        """What this rank writes. Collective the first time.

        With `copy_to_host` the tensors are copied, so that training may change the originals while they are written.
        """
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(entries, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=dist.get_rank() == 0)
        if self._plan is None:
            self._plan = self._agree_on_plan(planner)
        items = [(item, planner.resolve_data(item)) for item in self._plan.items]
        return self._copied(items) if copy_to_host else items

    def write(self, items: list[tuple[WriteItem, Tensor]], directory: Path) -> list[WriteResult]:
        """Writes this rank's file and returns when it is on disk. Needs no other rank. Raises OSError."""
        return write_shards(directory, f"__{dist.get_rank()}_0.distcp", items) if items else []

    def finish(self, results: list[list[WriteResult]], directory: Path) -> None:
        """Rank 0: writes the metadata of all ranks' results. Raises OSError."""
        FileSystemWriter(directory).finish(self._metadata, results)
        torch.save({}, directory / _COMMON)
        config = CheckpointingConfig("torch_dist", 1)
        (directory / CONFIG_FNAME).write_text(json.dumps(asdict(config)))

    def _agree_on_plan(self, planner: MCoreSavePlanner) -> Any:
        def local_step() -> Any:
            return planner.create_local_plan()

        def global_step(plans: list[Any]) -> list[Any]:
            plans, self._metadata = planner.create_global_plan(plans)
            return plans

        return planner.finish_plan(_DistWrapper(None, True, 0).reduce_scatter("plan", local_step, global_step))

    def _copied(self, items: list[tuple[WriteItem, Tensor]]) -> list[tuple[WriteItem, Tensor]]:
        tensors = [tensor for _, tensor in items]
        if not self._host:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]
        for target, tensor in zip(self._host, tensors, strict=True):
            target.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return [(item, host) for (item, _), host in zip(items, self._host, strict=True)]
