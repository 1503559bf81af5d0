"""Checkpoints that compat/dist_checkpointing.py writes are Megatron-Core's: its own loader reads them back."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_opd.compat.cpu_platform import apply_cpu_platform
from megatron_opd.compat.dist_checkpointing import (
    METADATA,
    CheckpointException,
    agree_on_plan,
    file_name,
    first_failure,
    save_planner,
    write_metadata,
    write_shards,
)
from megatron_opd.parallel.collective import all_gather
from tests.distributed import run_distributed

ROWS, WIDTH = 6, 5


def entries(rank: int, world_size: int, fill: bool):
    """A tensor in two halves, one per rank, and one that both ranks hold, of which the first writes its copy."""
    half = ROWS // world_size
    whole = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    mine = whole[rank * half : (rank + 1) * half] if fill else torch.zeros(half, WIDTH)
    same = torch.full((3,), 7.0) if fill else torch.zeros(3)

    def sharded(key, data, shape, offset, replica):
        return ShardedTensor(
            key=key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=shape,
            global_offset=offset,
            axis_fragmentations=None,
            replica_id=replica,
        )

    return (
        {
            "a": sharded("halves", mine, (ROWS, WIDTH), (rank * half, 0), (0, 0, 0)),
            "b": sharded("copies", same, (3,), (0,), (0, 0, rank)),
        },
        mine,
        same,
    )


def written(rank: int, world_size: int, folder: str):
    apply_cpu_platform()
    path = Path(folder, "checkpoint")
    if rank == 0:
        path.mkdir()
    dist.barrier()
    full, *_ = entries(rank, world_size, fill=True)
    planner = save_planner(full, is_coordinator=rank == 0)
    plan, metadata = agree_on_plan(planner)
    assert (metadata is None) == (rank != 0)
    items = [(item, planner.resolve_data(item)) for item in plan.items]
    results = all_gather(write_shards(path, file_name(rank), items) if items else [])
    if rank == 0:
        write_metadata(path, metadata, results)
    dist.barrier()
    empty, mine, same = entries(rank, world_size, fill=False)
    dist_checkpointing.load(empty, str(path), strict=StrictHandling.RAISE_ALL)
    _, expected, expected_same = entries(rank, world_size, fill=True)
    assert torch.equal(mine, expected) and torch.equal(same, expected_same)
    dist.barrier()
    if rank == 0:
        (path / file_name(1)).write_bytes(bytes((path / file_name(1)).stat().st_size))
    dist.barrier()
    failure, files = None, sorted(p.name for p in path.iterdir())
    again, *_ = entries(rank, world_size, fill=False)
    try:
        dist_checkpointing.load(again, str(path), strict=StrictHandling.RAISE_ALL)
    except CheckpointException as error:  # no Exception: who reads must name it
        failure = type(first_failure(error)).__name__
    return files, failure


def test_megatron_core_reads_what_is_written_and_says_what_it_cannot(tmp_path):
    outcomes = run_distributed(2, written, str(tmp_path))
    for files, _ in outcomes:
        assert set(files) == {METADATA, file_name(0), file_name(1), "common.pt", "metadata.json"}
    failures = [failure for _, failure in outcomes]
    assert failures[1], "rank 1 reads the scrambled file"  # from 0.17 on rank 0, which does not, hears nothing of it
    assert not {"CheckpointException", "BaseException"} & set(failures)


def test_a_view_is_written_alone(tmp_path):
    class Item:
        index = 0

    whole = torch.zeros(1000, 100)
    (result,) = write_shards(tmp_path, "f", [(Item(), whole[:2])])
    assert result.size_in_bytes < 4000 and (tmp_path / "f").stat().st_size == result.size_in_bytes


def test_the_first_failure_of_all_ranks():
    one, other = OSError(28, "No space left on device"), ValueError("later")
    assert first_failure(CheckpointException("save", {0: (one, None), 1: (other, None)})) is one
    assert first_failure(other) is other
    with pytest.raises(pickle.PicklingError):
        raise first_failure(pickle.PicklingError())
