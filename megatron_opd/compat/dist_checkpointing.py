"""Writing a checkpoint in Megatron-Core's torch_dist format without its writer, and reading its errors.

Private names of megatron.core.dist_checkpointing and of torch.distributed.checkpoint, each behind a function of ours.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
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
from torch.futures import Future

__all__ = ["CheckpointException", "Metadata", "SavePlan", "WriteItem", "WriteResult"]

FORMAT = ("torch_dist", 1)
METADATA = ".metadata"  # torch's index of a checkpoint; written last
_COMMON = "common.pt"  # what Megatron-Core does not shard: nothing of ours

Entries = dict[str, ShardedTensor]


def save_planner(entries: Entries, is_coordinator: bool) -> MCoreSavePlanner:
    """A planner that knows which of these tensors this rank writes."""
    planner = _planner()
    planner.set_up_planner(mcore_to_pyt_state_dict(_by_key(entries)), is_coordinator=is_coordinator)
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
    directory: str | os.PathLike[str], name: str, items: Iterable[tuple[WriteItem, Tensor | io.BytesIO]]
) -> list[WriteResult]:
    """Writes one rank's file, on disk when it returns, and tells what lies where in it. Raises OSError."""
    results = []
    with open(os.path.join(directory, name), "wb") as stream:
        for item, data in items:
            start = stream.tell()
            if isinstance(data, io.BytesIO):
                stream.write(data.getbuffer())
            else:
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
    (directory / CONFIG_FNAME).write_text(json.dumps(asdict(CheckpointingConfig(*FORMAT))))


class StreamingStrategy(TorchDistSaveShardedStrategy):
    """For `dist_checkpointing.save`: the ranks write their files themselves, tensor by tensor.

    Megatron-Core's own writer copies every view of a larger tensor (the halves of each gate/up matrix) before it writes
    the first, and starts processes that import the main module.
    """

    def __init__(self) -> None:
        super().__init__(*FORMAT)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        state = mcore_to_pyt_state_dict(_by_key(sharded_state_dict))
        checkpoint.save(state, storage_writer=_StreamingWriter(checkpoint_dir), planner=_planner())


class _StreamingWriter(checkpoint.FileSystemWriter):
    """One file per rank, one tensor in memory at a time."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        done: Future[list[WriteResult]] = Future()
        done.set_result(write_shards(self.path, name, ((item, planner.resolve_data(item)) for item in plan.items)))
        return done


def first_failure(error: BaseException) -> BaseException:
    """What a rank met, out of the collection of all ranks' failures that torch's checkpoint code raises."""
    for failure in getattr(error, "failures", {}).values():
        return failure[0] if isinstance(failure, tuple) else failure
    return error


def _planner() -> MCoreSavePlanner:
    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)


def _by_key(entries: Any) -> Any:
    return _replace_state_dict_keys_with_sharded_keys(entries, keep_only_main_replica=True)[0]
