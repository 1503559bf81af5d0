"""Hugging Face checkpoints to and from the converted format that every layout loads.

    python tools/convert.py import --hf DIR --out DIR [--tp N --pp N --dtype bf16]
    python tools/convert.py export --megatron DIR --out DIR
    python tools/convert.py verify --hf DIR --megatron DIR

With --tp/--pp each of the TP x PP processes holds only its part of the model: the tool starts them on this machine, or
joins those that torchrun or srun started. Everything runs on CPUs. Problems end with one message and exit code 1, and
nothing half-written is left at the destination.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installed package

STORE = "CONVERT_STORE"  # environment variable of the processes that this tool starts
DTYPES = ("bf16", "fp32")
DEFAULT_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}


class Parser(argparse.ArgumentParser):
    """Reports usage errors like all others: one message, exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message} (see {self.prog} --help)\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    layout = Parser(add_help=False)
    layout.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default 1)")
    layout.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default 1)")
    layout.add_argument("--family", metavar="MODULE:NAME", help="architecture of your own, as student.family")
    pickled = Parser(add_help=False)
    pickled.add_argument(
        "--allow-pickle",
        action="store_true",
        help="accept pytorch_model*.bin where there are no safetensors. A pickle can run any code of its author, with "
        "your rights, while it is read; torch's restricted unpickler is used, which has had holes. Only for files you "
        "trust",
    )
    dtype = "fp32 or bf16; fp32 to bf16 rounds. Default: what holds every tensor of the input exactly"

    command = commands.add_parser("import", parents=[layout, pickled], help="Hugging Face -> converted directory")
    command.add_argument("--hf", required=True, type=Path, metavar="DIR", help="safetensors, config.json, tokenizer")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty directory")
    command.add_argument("--dtype", choices=DTYPES, help=dtype)

    command = commands.add_parser("export", parents=[layout], help="converted -> Hugging Face directory")
    command.add_argument("--megatron", required=True, type=Path, metavar="DIR", help="made by `import`")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty directory")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default 5GB)")

    command = commands.add_parser("verify", parents=[layout, pickled], help="logits of both against each other")
    command.add_argument("--hf", required=True, type=Path, metavar="DIR")
    command.add_argument("--megatron", required=True, type=Path, metavar="DIR", help="converted directory")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="what both compute in (default fp32, also for bf16 parameters: they are exact in it, so any difference "
        "of the parameters shows; bf16 rounds each operation, which hides small ones)",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest allowed difference of two logits, as a share of the largest logit "
        f"(default {DEFAULT_TOLERANCE['fp32']:g} in fp32, {DEFAULT_TOLERANCE['bf16']:g} in bf16)",
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="text to compare on besides the built-in one")
    command.add_argument("--length", type=int, default=128, metavar="N", help="tokens of each text (default 128)")
    args = parser.parse_args(argv)
    if args.tp < 1 or args.pp < 1:
        parser.error(f"--tp {args.tp} --pp {args.pp}: both must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 for any problem and for a `verify` beyond the tolerance."""
    args = parse(argv)
    processes = args.tp * args.pp
    if "RANK" not in os.environ and processes > 1:
        return start_processes(processes, sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave through the clean-up
    warnings.filterwarnings("ignore", module="(megatron|mbridge|torch)")  # of their own deprecations, and of Apex
    import convert_steps  # after the filter, and not at all for --help

    from megatron_opd.errors import OPDError, describe

    try:
        with process_group(processes):
            return getattr(convert_steps, f"{args.command}_")(args)
    except (OPDError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not getattr(error, "known_to_all", False):
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        return 1


def start_processes(count: int, argv: list[str]) -> int:
    """Runs this command in `count` processes on this machine; the first failure ends the others."""
    folder = tempfile.mkdtemp(prefix="convert-")  # where they meet; a port chosen now could be taken by then
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    common = {STORE: os.path.join(folder, "store"), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(count)}
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    processes = []
    try:
        for rank in range(count):
            env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
            processes.append(subprocess.Popen(command, env=env))
        while True:
            codes = [process.poll() for process in processes]
            for rank, code in enumerate(codes):
                if code is not None and code < 0:
                    print(f"error: process {rank} was ended by signal {-code} (9: out of memory?)", file=sys.stderr)
            if any(codes):
                return 1
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
    finally:
        deadline = time.monotonic() + 10  # for ranks that know of the failure and leave by themselves
        for process in processes:
            for stop in (lambda: None, process.terminate, process.kill):
                stop()
                try:
                    process.wait(timeout=max(1.0, deadline - time.monotonic()))
                    break
                except subprocess.TimeoutExpired:
                    continue
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def process_group(processes: int) -> Iterator[None]:
    """A gloo group over the processes that were started, which must be TP x PP."""
    import torch.distributed as dist

    from megatron_opd.compat.cpu_platform import apply_cpu_platform
    from megatron_opd.config import ConfigError

    apply_cpu_platform()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != processes:
        raise ConfigError(f"--tp x --pp is {processes}, but {world} processes were started; start {processes}")
    if world == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    elif STORE in os.environ:
        path, rank = os.environ[STORE], int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
