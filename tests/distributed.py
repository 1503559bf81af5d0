"""Run a function on several gloo processes and hand back what each rank returned.

The processes of a world size are started once for a whole test session and wait for functions; so does what they are
forked from, which has imported Megatron-Core once. A group that a function has broken is replaced.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy
import torch
import torch.distributed as dist

LIMIT_S = 1800.0  # a hang is ended by then, however slow the machine
starts: dict[int, int] = {}  # world size -> how many times its processes have been started in this session
_shared: dict[tuple[int, str], Ranks] = {}


def free_port() -> int:
    """A port that no process listens on, below those that the system gives to connections: one of these could be taken
    between this call and the server's start."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run_distributed(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    fresh: bool = False,
    start: str = "forkserver",
    timeout: float = LIMIT_S,
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` gloo processes on this machine.

    `fn` is a module-level function; it, `args` and the return values must be picklable. The default process group
    exists when `fn` runs, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them.
    Processes may start processes of their own. Whatever ran in them before has left no process groups, environment
    variables or random state behind, but patches of modules stay: a function that makes some, is measured for memory or
    sets limits of its process asks for `fresh` ones. With `start="spawn"` every process imports for itself once.

    Returns the ranks' return values in rank order. Raises RuntimeError with the traceback of the rank that failed
    first, or TimeoutError naming the ranks still running after `timeout` seconds.
    """
    key = (world_size, start)
    ranks = None if fresh else _shared.pop(key, None)
    if ranks is None:
        ranks = Ranks(world_size, start)
    try:
        results = ranks.call(fn, args, timeout)
    except BaseException:
        ranks.kill()
        raise
    if fresh or not ranks.reusable:
        ranks.close()
    else:
        _shared[key] = ranks
    return results


def close() -> None:
    """Ends all shared processes."""
    while _shared:
        _shared.popitem()[1].close()


atexit.register(close)  # before multiprocessing's own, which would wait for them


class Ranks:
    """The processes of one gloo group, each at the other end of a pipe."""

    def __init__(self, world_size: int, start: str) -> None:
        starts[world_size] = starts.get(world_size, 0) + 1
        self.world_size, self.reusable = world_size, True
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(["tests.preload"])  # the server starts with the first process
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            args = (rank, world_size, self._store.port, theirs)
            process = context.Process(target=_serve, args=args, name=f"rank{rank}")
            process.start()
            theirs.close()  # the rank's end of it is the only one: its death is heard
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        packed = pickle.dumps((fn, args))  # by value: multiprocessing would send each tensor as a file descriptor
        for connection in self.connections:
            connection.send_bytes(packed)
        results: list[Any] = [None] * self.world_size
        deadline = time.monotonic() + timeout
        running = {connection: rank for rank, connection in enumerate(self.connections)}
        while running:
            heard = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
            if not heard:
                names = ", ".join(f"rank{rank}" for rank in running.values())
                raise TimeoutError(f"{names} still running after {timeout} s")
            failures = []
            for connection in heard:
                rank = running.pop(connection)
                try:
                    kind, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    failures.append((float("inf"), rank, f"died, exit code {self.processes[rank].exitcode}"))
                    continue
                if kind == "failed":
                    failures.append((value[0], rank, value[1]))
                else:
                    results[rank], stays = value
                    self.reusable &= stays
            if failures:  # the earliest: others usually fail later, on a connection that the first one closed
                _, rank, text = min(failures)
                raise RuntimeError(f"rank {rank} of {self.world_size} failed:\n{text}")
        return results

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(LIMIT_S)
            process.close()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.close()


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    """A rank: calls what it is sent until the other end of the pipe closes."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=LIMIT_S)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        clean = _Clean()
        while True:
            try:
                packed = connection.recv_bytes()
            except EOFError:
                break
            fn, args = pickle.loads(packed)
            result = fn(rank, world_size, *args)
            stays = clean.restore()
            connection.send_bytes(pickle.dumps(("returned", (result, stays))))
            del fn, args, result
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # no shutdown of the interpreter: it looks for garbage among all that was imported
    except BaseException:
        connection.send_bytes(pickle.dumps(("failed", (time.monotonic(), traceback.format_exc()))))
        os._exit(1)  # a failed collective can hang the interpreter's own shutdown


class _Clean:
    """A process as it was before its first function."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.random = (torch.get_rng_state(), random.getstate(), numpy.random.get_state())
        self.dtype = torch.get_default_dtype()

    def restore(self) -> bool:
        """Returns whether the default process group is still there. Collective if so."""
        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_rng_state(self.random[0])
        random.setstate(self.random[1])
        numpy.random.set_state(self.random[2])
        torch.set_default_dtype(self.dtype)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        if not dist.is_initialized():
            return False
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        destroy_groups()
        return True


def destroy_groups() -> None:
    """Ends every process group but the default one: each has a gloo thread that wakes up a hundred times a second."""
    dist.barrier()  # nobody leaves while another rank still talks to it
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def groups_of_two_and_four(rank: int) -> dict[int, dist.ProcessGroup]:
    """In a world of 4: this rank's pair, and everybody; one call then covers both sizes. Every rank must call it."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {2: pairs[rank // 2], 4: dist.group.WORLD}
