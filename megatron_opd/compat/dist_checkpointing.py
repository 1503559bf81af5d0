"""Writing a checkpoint in Megatron-Core's torch_dist format without its writer, and reading its errors.

Its writer copies every view of a larger tensor (the halves of each gate/up matrix) before it writes the first, starts
processes that import the main module and, from 0.17 on, leaves out common.pt, which 0.16 asks for.

Private names of megatron.core.dist_checkpointing and of torch.distributed.checkpoint, each behind a function of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

__all__ = ["CheckpointException", "Metadata", "SavePlan", "WriteItem", "WriteResult"]

METADATA = ".metadata"  # torch's index of a checkpoint; written last
_COMMON = "common.pt"  # what Megatron-Core does not shard: nothing of ours

Entries = dict[str, ShardedTensor]


def save_planner(entries: Entries, is_coordinator: bool) -> MCoreSavePlanner:
    """A planner that knows which of these tensors this rank writes."""
    by_key, *_ = _replace_state_dict_keys_with_sharded_keys(entries, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=is_coordinator)
    return planner


def agree_on_plan(planner: MCoreSavePlanner) -> tuple[SavePlan, Metadata | None]:
    """This rank's plan, whose `items` it writes, and on rank 0 the checkpoint's metadata. Collective over the world."""
    metadata: list[Metadata | None] = [None]

    def global_step(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata[0] = planner.create_global_plan(plans)
        return plans

    mine = _DistWrapper(None, True, 0).reduce_scatter("plan", planner.create_local_plan, global_step)
    return planner.finish_plan(mine), metadata[0]


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"__{rank}_0.distcp"


def write_shards(
    directory: str | os.PathLike[str], name: str, items: Iterable[tuple[WriteItem, Tensor]]
) -> list[WriteResult]:
    """Writes one rank's file, on disk when it returns, and tells what lies where in it; needs memory for one tensor.

    Raises OSError.
    """
    results = []
    with open(os.path.join(directory, name), "wb") as stream:
        for item, data in items:
            start = stream.tell()
            data = data.detach().cpu()
            # torch.save would store the whole tensor that a view looks at
            torch.save(data.clone() if data.untyped_storage().nbytes() != data.nbytes else data, stream)
            size = stream.tell() - start
            results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
        stream.flush()
        os.fsync(stream.fileno())
    return results


def write_metadata(directory: Path, metadata: Metadata, results: list[list[WriteResult]]) -> None:
    """On rank 0, from all ranks' results: what makes a directory of shards a checkpoint. Raises OSError."""
    checkpoint.FileSystemWriter(directory).finish(metadata, results)
    torch.save({}, directory / _COMMON)
    (directory / CONFIG_FNAME).write_text(json.dumps(asdict(CheckpointingConfig("torch_dist", 1))))


def first_failure(error: BaseException) -> BaseException:
    """What a rank met, out of the collection of all ranks' failures that torch's checkpoint code raises."""
    for failure in getattr(error, "failures", {}).values():
        return failure[0] if isinstance(failure, tuple) else failure
    return error
