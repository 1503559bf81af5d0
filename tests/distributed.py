"""Run a function on several gloo processes and hand back what each rank returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _child(rank: int, world_size: int, port: int, folder: str, timeout: float, fn: Callable[..., Any], args: bytes):
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
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        result = fn(rank, world_size, *pickle.loads(args))
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while another rank still talks to it
        dist.destroy_process_group()
    except BaseException:
        # Written under another name first: the parent must never read half a traceback.
        partial = Path(folder, f"{rank}.partial")
        partial.write_text(traceback.format_exc())
        partial.rename(Path(folder, f"{rank}.error"))
        os._exit(1)  # a failed collective can hang the interpreter's own shutdown


def run_distributed(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, start: str = "forkserver"
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` gloo processes on this machine.

    `fn` is a module-level function; it, `args` and the return values must be picklable. The default process group
    exists when `fn` runs, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as torchrun sets them.
    Processes may start processes of their own. The first call of a session costs seconds of imports; every process has
    state of its own (patches, process groups), whatever ran before. With `start="spawn"` every process imports for
    itself, at the price of seconds.

    Returns the ranks' return values in rank order. Raises RuntimeError with the traceback of the rank that failed
    first, or TimeoutError naming the ranks still running after `timeout` seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["tests.preload"])  # the server starts with the first call and imports it once
    packed = pickle.dumps(args)  # by value: multiprocessing would send each tensor as a file descriptor
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                target_args = (rank, world_size, store.port, folder, timeout, fn, packed)
                process = context.Process(target=_child, args=target_args, name=f"rank{rank}")
                process.start()
                processes.append(process)
            deadline = time.monotonic() + timeout
            running = list(processes)
            while running:
                left = deadline - time.monotonic()
                if left <= 0 or not wait([p.sentinel for p in running], timeout=left):
                    raise TimeoutError(f"{', '.join(p.name for p in running)} still running after {timeout} s")
                if any(p.exitcode not in (None, 0) for p in running):
                    raise RuntimeError(_first_failure(Path(folder), processes))
                running = [p for p in running if p.exitcode is None]
            return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()


def _first_failure(folder: Path, processes: list[Any]) -> str:
    """The earliest traceback: the other ranks usually fail later, on a connection that the first one closed."""
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        return f"rank {errors[0].stem} of {len(processes)} failed:\n{errors[0].read_text()}"
    return "died without a traceback: " + ", ".join(f"{p.name} (exit {p.exitcode})" for p in processes if p.exitcode)


def groups_of_two_and_four(rank: int) -> dict[int, dist.ProcessGroup]:
    """In a world of 4: this rank's pair, and everybody; one spawn then covers both sizes. Every rank must call it."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {2: pairs[rank // 2], 4: dist.group.WORLD}
