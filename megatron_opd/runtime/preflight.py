"""Checks the nodes of a job in a few seconds, before an allocation is spent on them; names those that are bad.

    srun --ntasks-per-node=1 python -m megatron_opd.runtime.preflight --nodes n1,n2 --port 30000 --directory RUN

One process per node. Each looks at its own GPUs (there, as many as elsewhere, able to multiply, no uncorrected memory
errors) and disk (writable, enough space). Then all meet at the first node: who does not come is named, clocks are
compared, and pairs of nodes time an all-reduce (NCCL over all GPUs of both, or gloo). With one bad node among several,
the pairs tell which. Prints lines that begin with "preflight:"; exit code 1 on every node where something is bad.

Each limit is an option here and a variable of the job scripts (slurm/lib.sh), which the message about a bad node names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GIB = 1 << 30
ROUNDS = 5  # all-reduces of one measurement at most; the best counts
ENOUGH_S = 2.0  # no further one after so many seconds
MIN_GBPS_GPU, MIN_GBPS_CPU = 1.0, 0.05  # slower than 10 Gb/s Ethernet; than half of 1 Gb/s


@dataclass
class Report:
    """What one node found out about itself."""

    node: str
    gpus: int = 0
    problems: list[str] = field(default_factory=list)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", required=True, type=lambda x: x.split(","), help="all nodes, the first one first")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", "0")), help="of this node")
    parser.add_argument("--port", type=int, required=True, help="free port on the first node")
    parser.add_argument("--address", help="of the first node; default: its name")
    parser.add_argument("--directory", type=Path, required=True, help="run directory: must be writable and have space")
    add = partial(parser.add_argument, type=float)
    add("--min-free-gb", default=50.0, help="MIN_FREE_GB: free space there, GiB")
    add("--min-gbps", help=f"MIN_GBPS: all-reduce of two nodes, GB/s ({MIN_GBPS_GPU:g}, without GPUs {MIN_GBPS_CPU:g})")
    add("--min-share", default=0.25, help="MIN_SHARE: of the fastest pair's all-reduce; 0 for no such limit")
    add("--max-skew-s", default=2.0, help="MAX_SKEW_S: a clock's difference to the others")
    add("--wait-s", default=60.0, help="PREFLIGHT_WAIT_S: how long to wait for the other nodes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    node, nodes = options.nodes[options.rank], options.nodes
    report = local_report(node, options.directory, options.min_free_gb)
    address = options.address or nodes[0]
    set_interface(address)
    try:
        store = dist.TCPStore(
            address,
            options.port,
            is_master=options.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=options.wait_s),
        )
    except Exception as error:
        return say([f"{node}: cannot reach {nodes[0]} at {address}:{options.port}: {first_line(error)}"])
    store.set(f"report/{options.rank}", json.dumps(asdict(report)))
    if options.rank == 0:
        problems, gpus = judge_reports(store, nodes, options.wait_s)
        store.set("verdict", json.dumps([problems, gpus]))
    try:
        problems, gpus = json.loads(store.get("verdict"))
    except Exception as error:
        return say([f"{node}: {nodes[0]} gave no verdict: {first_line(error)}"])
    if not problems:
        problems = network_problems(store, options, gpus)
    return finish(store, options.rank, len(nodes), problems, f"{len(nodes)} nodes, {gpus} GPUs each")


def local_report(node: str, directory: Path, min_free_gb: float) -> Report:
    """This node's GPUs and disk."""
    report = Report(node, torch.cuda.device_count())
    for name, folder, needed in (("run directory", directory, min_free_gb), ("/dev/shm", Path("/dev/shm"), 0.05)):
        problem = disk_problem(folder, needed)
        if problem:
            report.problems.append(f"{name} {folder}: {problem}")
    report.problems += gpu_problems(report.gpus)
    return report


def disk_problem(directory: Path, min_free_gb: float) -> str | None:
    """Writes, syncs and reads back a file, and looks at the free space."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".preflight-") as file:
            payload = os.urandom(1 << 20)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != payload:
                return "reads back something else than was written"
        free = shutil.disk_usage(directory).free / GIB
    except OSError as error:
        return f"not writable ({error.strerror})"
    return f"{free:.1f} GiB free, the limit is {min_free_gb:g} GiB (MIN_FREE_GB)" if free < min_free_gb else None


def gpu_problems(count: int) -> list[str]:
    """What is wrong with this node's GPUs; nothing on a node without any."""
    problems = []
    if shutil.which("nvidia-smi"):
        query = "index,ecc.errors.uncorrected.volatile.total"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        if done.returncode:
            problems.append(f"nvidia-smi fails: {(done.stderr or done.stdout).strip().splitlines()[:1]}")
        for line in done.stdout.splitlines():
            gpu, _, errors = line.partition(",")
            if errors.strip().isdigit() and int(errors) > 0:
                problems.append(f"GPU {gpu}: {int(errors)} uncorrected memory errors since it was reset")
    for index in range(count):
        try:
            left = torch.full((1024, 1024), 2.0, device=f"cuda:{index}")
            if float((left @ left).mean()) != 4096.0:
                problems.append(f"GPU {index}: a matrix product is wrong")
        except RuntimeError as error:
            problems.append(f"GPU {index}: {first_line(error)}")
    return problems


def judge_reports(store: dist.Store, nodes: list[str], wait_s: float) -> tuple[list[str], int]:
    """On the first node: waits for everybody's report; returns all problems, and the GPUs of a node."""
    problems, counts, deadline = [], {}, time.monotonic() + wait_s
    for rank, node in enumerate(nodes):
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except Exception:
            problems.append(
                f"{node}: did not come within {wait_s:g} s (PREFLIGHT_WAIT_S): down, unreachable, or Python fails there"
            )
            continue
        report = Report(**json.loads(store.get(f"report/{rank}")))
        problems += [f"{node}: {p}" for p in report.problems]
        counts[node] = report.gpus
    most = max(counts.values(), default=0)
    problems += [f"{node}: {count} GPUs, other nodes have {most}" for node, count in counts.items() if count < most]
    asked = os.environ.get("SLURM_GPUS_ON_NODE")
    if not most and asked and not problems:
        print(f"preflight: Slurm gave {asked} GPUs a node, but no node has any: CPU and gloo", flush=True)
    return problems, most


def network_problems(store: dist.Store, options: argparse.Namespace, gpus: int) -> list[str]:
    """Clocks and bandwidths, measured together; the same list on every node."""
    nodes, rank = options.nodes, options.rank
    if len(nodes) == 1:
        return []
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=rank,
            world_size=len(nodes),
            timeout=timedelta(seconds=options.wait_s),
        )
        skews = clock_skews(len(nodes))
        rates = pair_bandwidths(store, options, gpus)
    except Exception as error:
        return [f"{nodes[rank]}: the nodes cannot talk to each other: {first_line(error)}"]
    problems = [
        f"{nodes[i]}: its clock is {skew:+.1f} s off the others', the limit is {options.max_skew_s:g} s (MAX_SKEW_S)"
        for i, skew in enumerate(skews)
        if abs(skew) > options.max_skew_s
    ]
    usual = MIN_GBPS_GPU if gpus else MIN_GBPS_CPU
    least = usual if options.min_gbps is None else options.min_gbps
    problems += slow_links(nodes, rates, least, options.min_share)
    if rank == 0:
        text = ", ".join(f"{nodes[i]}-{nodes[j]} {rate:.3g}" for (i, j), rate in rates.items())
        print(f"preflight: all-reduce in GB/s: {text}; clocks within {max(map(abs, skews)):.2f} s", flush=True)
    return problems


def clock_skews(count: int) -> list[float]:
    """Each node's clock minus the median, in seconds, read right behind a barrier."""
    best: list[float] = []
    for _ in range(3):
        dist.barrier()
        clocks: list[Any] = [None] * count
        dist.all_gather_object(clocks, time.time())
        skews = [c - statistics.median(clocks) for c in clocks]
        if not best or max(map(abs, skews)) < max(map(abs, best)):
            best = skews
    return best


def pairs(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs: each node meets two others (all others among up to three)."""
    if count == 2:
        return [[(0, 1)]]
    ring = [(i, (i + 1) % count) for i in range(count)]
    even = count - count % 2
    return [ring[0:even:2], ring[1:even:2], ring[even:]][: 2 + count % 2]


def pair_bandwidths(store: dist.Store, options: argparse.Namespace, gpus: int) -> dict[tuple[int, int], float]:
    """GB/s of an all-reduce between two nodes, for the pairs of `pairs`; the same on every node. Collective."""
    rates: dict[tuple[int, int], float] = {}
    for number, together in enumerate(pairs(len(options.nodes))):
        mine = next((p for p in together if options.rank in p), None)
        if mine is not None:
            name, side = f"pair/{number}/{mine[0]}", mine.index(options.rank)
            prefix = dist.PrefixStore(name, store)
            rate = gpu_bandwidth(options, prefix, side, gpus) if gpus else cpu_bandwidth(prefix, side)
            if side == 0:
                store.set(f"{name}/rate", str(rate))
        dist.barrier()
        for pair in together:
            rates[pair] = float(store.get(f"pair/{number}/{pair[0]}/rate"))
    return rates


def cpu_bandwidth(store: dist.Store, side: int, megabytes: int = 16) -> float:
    """Gloo all-reduce of two nodes in GB/s: 2 (n - 1) / n times the bytes over the time, n = 2."""
    group = dist.ProcessGroupGloo(store, side, 2, timedelta(seconds=60))
    return timed(megabytes << 20, lambda tensor: group.allreduce([tensor]).wait(), torch.device("cpu"))  # type: ignore[attr-defined]


def timed(size: int, reduce: Callable[[torch.Tensor], object], device: torch.device, ranks: int = 2) -> float:
    tensor, best, began = torch.zeros(size // 4, device=device), 0.0, time.perf_counter()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        tensor[0] = float(start - began > ENOUGH_S)  # the sum is the same on all ranks, so all stop together
        reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * (ranks - 1) / ranks * size / (time.perf_counter() - start) / 1e9)
        if tensor[0] > 0:
            break
    return best


def gpu_bandwidth(options: argparse.Namespace, store: dist.Store, side: int, gpus: int) -> float:
    """NCCL all-reduce over all GPUs of both nodes, a process each; returns GB/s of the bus."""
    if side == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            store.set("port", str(free.getsockname()[1]))
        store.set("host", options.nodes[options.rank])
    where = store.get("host").decode(), int(store.get("port"))
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_gpu_worker, args=(where, side, gpus, options.wait_s, queue), nprocs=gpus)
    return queue.get() if side == 0 else 0.0


def _gpu_worker(local: int, where: tuple[str, int], side: int, gpus: int, wait_s: float, queue: Any) -> None:
    torch.cuda.set_device(local)
    rank = side * gpus + local
    store = dist.TCPStore(*where, world_size=2 * gpus, is_master=rank == 0, timeout=timedelta(seconds=wait_s))
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2 * gpus, timeout=timedelta(seconds=wait_s))
    rate = timed(256 << 20, dist.all_reduce, torch.device("cuda", local), 2 * gpus)
    if rank == 0:
        queue.put(rate)
    dist.destroy_process_group()


def slow_links(nodes: list[str], rates: dict[tuple[int, int], float], least: float, share: float) -> list[str]:
    """A line on each pair that is slower than `least` GB/s, or than `share` of the fastest pair."""
    fastest = max(rates.values())
    limit, name = max((least, "MIN_GBPS"), (share * fastest, f"MIN_SHARE of the fastest pair's {fastest:.3g}"))
    lines = []
    for pair, rate, sure in slow_nodes(rates, limit):
        first, other = (nodes[i] for i in pair)
        link = f"{first}: all-reduce with {other}" if sure else f"{first} or {other}: all-reduce between them"
        lines.append(f"{link} reaches {rate:.3g} GB/s, the limit is {limit:.3g} GB/s ({name})")
    return lines


def slow_nodes(rates: dict[tuple[int, int], float], limit: float) -> list[tuple[tuple[int, int], float, bool]]:
    """Pairs below the limit, their rates, and whether the first one is to blame: all of its pairs are slow."""
    slow = {pair: rate for pair, rate in rates.items() if rate < limit}
    partners: dict[int, list[bool]] = {}
    for pair in rates:
        for node in pair:
            partners.setdefault(node, []).append(pair in slow)
    suspects = {node for node, marks in partners.items() if all(marks) and len(marks) > 1}
    links = []
    for (i, j), rate in slow.items():
        sure = (i in suspects) != (j in suspects)
        links.append(((j, i) if sure and j in suspects else (i, j), rate, sure))
    return links


def set_interface(address: str) -> None:
    """Gloo and NCCL must use the interface that reaches the others, not what the host name happens to resolve to."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((socket.gethostbyname(address), 9))
            own = probe.getsockname()[0]
    except OSError:
        return
    for name, entries in psutil.net_if_addrs().items():
        if any(e.family == socket.AF_INET and e.address == own for e in entries):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)


def finish(store: dist.Store, rank: int, count: int, problems: list[str], fine: str) -> int:
    """Rank 0 speaks, and stays until the others have read everything: it holds the store."""
    code = say(problems if rank == 0 else [], fine if rank == 0 else None)
    try:
        store.add("left", 1)
        deadline = time.monotonic() + 5
        while rank == 0 and store.add("left", 0) < count and time.monotonic() < deadline:
            time.sleep(0.02)
    except Exception:
        pass  # rank 0 has gone already
    return 1 if problems else code


def say(problems: list[str], fine: str | None = None) -> int:
    for problem in problems:
        print(f"preflight: bad node {problem}", flush=True)
    if not problems and fine:
        print(f"preflight: {fine}, all fine", flush=True)
    return 1 if problems else 0


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]


if __name__ == "__main__":  # the GPU workers import this module
    sys.exit(main())
