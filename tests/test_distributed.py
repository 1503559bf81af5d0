"""The multi-process test helper itself: results in rank order, shared and clean processes, the first failure's
traceback, a bounded wait."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed, starts


def _sum_of_ranks(rank, world_size, factor):
    value = torch.tensor([float(rank) * factor])
    dist.all_reduce(value)
    return rank, world_size, value


def _fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("only rank one is broken")
    dist.barrier()


def _die_on_one(rank, world_size):
    if rank == 1:
        os._exit(9)
    time.sleep(1000)


def _hang_on_zero(rank, world_size):
    if rank == 0:
        time.sleep(1000)


def _leave_things_behind(rank, world_size):
    drawn = torch.rand(1), random.random()
    os.environ["LEFT_BEHIND"] = "1"
    dist.new_group([0, 1])
    torch.set_default_dtype(torch.float64)
    return os.getpid(), drawn


def _look(rank, world_size):
    groups = len(dist.distributed_c10d._world.pg_map)
    return os.getpid(), (torch.rand(1), random.random()), "LEFT_BEHIND" in os.environ, groups, torch.get_default_dtype()


def _end_the_group(rank, world_size):
    dist.destroy_process_group()


def test_results_come_back_in_rank_order():
    assert run_distributed(2, _sum_of_ranks, 10.0) == [(0, 2, torch.tensor([10.0])), (1, 2, torch.tensor([10.0]))]


def test_the_first_failing_rank_is_reported():
    with pytest.raises(RuntimeError, match="(?s)rank 1 of 2 failed.*ValueError: only rank one is broken"):
        run_distributed(2, _fail_on_one)


def test_a_hang_is_bounded():
    with pytest.raises(TimeoutError, match="rank0"):
        run_distributed(1, _hang_on_zero, timeout=2)


def test_processes_are_shared_and_clean():
    run_distributed(2, _sum_of_ranks, 1.0)
    before = dict(starts)
    first, second = run_distributed(2, _leave_things_behind), run_distributed(2, _look)
    assert starts == before
    for (process, drawn), (other_process, drawn_again, variable, groups, dtype) in zip(first, second):
        assert (process, drawn) == (other_process, drawn_again)
        assert (variable, groups, dtype) == (False, 1, torch.float32)


def test_processes_of_their_own_and_after_a_broken_group():
    run_distributed(2, _sum_of_ranks, 1.0)
    count = starts[2]
    run_distributed(2, _sum_of_ranks, 1.0, fresh=True)
    assert starts[2] == count + 1
    run_distributed(2, _end_the_group)
    assert run_distributed(2, _sum_of_ranks, 1.0)[1][2] == 1.0
    assert starts[2] == count + 2


def test_a_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed:\ndied, exit code 9"):
        run_distributed(2, _die_on_one)
