"""Writing a checkpoint in Megatron-Core's torch_dist format without its writer, and reading its errors.

Its writer copies every view of a larger tensor (the halves of each gate/up matrix) before it writes the first, starts
processes that import the main module and, from 0.17 on, leaves out common.pt, which 0.16 asks for.

Its reader and torch's unpickle two of a checkpoint's files, and whole objects where .metadata says that an entry holds
them: each could run code of whoever wrote the checkpoint. `load` looks at both files before.

Private names of megatron.core.dist_checkpointing and of torch.distributed.checkpoint, each behind a function of ours.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_opd.errors import InputError

__all__ = ["CheckpointException", "Metadata", "SavePlan", "WriteItem", "WriteResult"]

METADATA = ".metadata"  # torch's index of a checkpoint; written last
_COMMON = "common.pt"  # what Megatron-Core does not shard: nothing of ours

# What the .metadata of a checkpoint of tensors names, beside torch's dtypes. BytesStorageMetadata is not among them: an
# entry of that kind is a pickled object.
_NEEDED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}

Entries = dict[str, ShardedTensor]


class UnsafeCheckpoint(InputError):
    """Reading the checkpoint would run code that stands in it, or read files outside it."""


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


def load(entries: Entries, directory: str | os.PathLike[str]) -> None:
    """Fills the entries' tensors from a checkpoint, which must hold these and no others. Collective over the world.

    Raises UnsafeCheckpoint before anything of the checkpoint could run, and what Megatron-Core, torch and pickle raise.
    """
    check_safe(Path(directory))
    dist_checkpointing.load(entries, str(directory), strict=StrictHandling.RAISE_ALL)


def check_safe(directory: Path) -> None:
    """Raises UnsafeCheckpoint where a file names more than tensors need, OSError, and what pickle raises."""
    path = directory / METADATA
    with path.open("rb") as stream:
        metadata = _TensorsOnly(stream, path).load()
    if not isinstance(metadata, Metadata):
        raise UnsafeCheckpoint(f"{path} holds no index of a checkpoint")
    for stored in (metadata.storage_data or {}).values():
        name = stored.relative_path
        if not isinstance(name, str) or Path(name).name != name:
            raise UnsafeCheckpoint(
                f"{path}: {str(name)[:200]!r} lies outside the checkpoint; only files in it are read"
            )
    common = directory / _COMMON
    if common.exists():
        # Megatron-Core asks for torch's restricted unpickler only as long as no environment variable forbids it
        try:
            torch.load(common, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpoint(f"{common}: {refused_pickle(error)}") from error


def refused_pickle(error: BaseException) -> str:
    """What torch's restricted unpickler has refused, without its advice to do without it; other errors as they are."""
    text = str(error)
    if "weights_only" not in text and "Weights only" not in text:
        return " ".join(text.split())
    named = re.search(r"GLOBAL ([\w.]+)", text)
    return f"refused, since reading it would call {named[1]}" if named else "refused: it holds more than tensors"


class _TensorsOnly(pickle.Unpickler):
    """Reads an index of tensors; whatever else the file names is not even imported."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NEEDED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UnsafeCheckpoint(
            f"{self.path}: refused, since reading it would call {module}.{name}, which no checkpoint of tensors needs"
        )


def first_failure(error: BaseException) -> BaseException:
    """What a rank met, out of the collection of all ranks' failures that torch's checkpoint code raises."""
    for failure in getattr(error, "failures", {}).values():
        return failure[0] if isinstance(failure, tuple) else failure
    return error
