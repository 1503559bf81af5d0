"""The multi-process test helper itself: results in rank order, the first failure's traceback, a bounded wait."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def _sum_of_ranks(rank, world_size, factor):
    value = torch.tensor([float(rank) * factor])
    dist.all_reduce(value)
    return rank, world_size, value


def _fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("only rank one is broken")
    dist.barrier()


def _hang_on_zero(rank, world_size):
    if rank == 0:
        time.sleep(1000)


def test_results_come_back_in_rank_order():
    assert run_distributed(2, _sum_of_ranks, 10.0) == [(0, 2, torch.tensor([10.0])), (1, 2, torch.tensor([10.0]))]


def test_the_first_failing_rank_is_reported():
    with pytest.raises(RuntimeError, match="(?s)rank 1 of 2 failed.*ValueError: only rank one is broken"):
        run_distributed(2, _fail_on_one)


def test_a_hang_is_bounded():
    with pytest.raises(TimeoutError, match="rank0"):
        run_distributed(1, _hang_on_zero, timeout=8)
