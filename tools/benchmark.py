"""Benchmarks of megatron_opd against what people use today. Each prints a table and writes JSON.

    python tools/benchmark.py overlap     prune.topk_overlap against gathering candidates and gathering logits
    python tools/benchmark.py step        a training step against the share of tokens kept
    python tools/benchmark.py rollout     tokens per second of each engine
    python tools/benchmark.py train       whole steps side by side with TRL's on-policy distillation
    python tools/benchmark.py scaling     a step as layers, sequence length, batch and ranks double
    python tools/benchmark.py prune       time to accuracy on the embedded example: off, short budget, paper, in_flight
    python tools/benchmark.py methods     the method and its published relatives: equal steps, equal trained tokens
    python tools/benchmark.py checkpoint  what saving costs a step; size on disk and time to load
    python tools/benchmark.py gpu         kernels, memory, training and scoring in bf16 and FP8, whole steps, on one GPU

What is compared runs in turns (A B A B ...), after a warm-up, on CPU with gloo or on GPUs with NCCL; times are medians
with quartiles. `python tools/benchmark.py NAME --help` lists the sizes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
for place in (str(TOOLS), str(TOOLS.parent)):  # also without an installed package, and in the processes it starts
    if place not in sys.path:
        sys.path.insert(0, place)

COMMANDS = {  # name: (module, function that adds arguments, function that runs)
    "overlap": ("benchmark.overlap", "add_arguments", "run"),
    "step": ("benchmark.step", "add_step_arguments", "run_step"),
    "rollout": ("benchmark.rollout", "add_arguments", "run"),
    "train": ("benchmark.train", "add_arguments", "run"),
    "scaling": ("benchmark.step", "add_scaling_arguments", "run_scaling"),
    "prune": ("benchmark.prune", "add_arguments", "run"),
    "methods": ("benchmark.methods", "add_arguments", "run"),
    "checkpoint": ("benchmark.checkpoint", "add_arguments", "run"),
    "gpu": ("benchmark.gpu", "add_arguments", "run"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, add, run) in COMMANDS.items():
        implementation = importlib.import_module(module)
        text = " ".join((implementation.__doc__ or "").split())
        command = commands.add_parser(name, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
        command.add_argument("--json", default=f"runs/benchmark/{name}.json", metavar="FILE", help="the report")
        getattr(implementation, add)(command)
        command.set_defaults(run=getattr(implementation, run))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from benchmark.common import BenchmarkError

    try:
        return options.run(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
