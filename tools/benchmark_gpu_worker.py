"""One part of the GPU benchmark, in this process: PART DEVICE SIZES OUT. Started by `benchmark.py gpu`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
for place in (str(TOOLS), str(TOOLS.parent)):
    if place not in sys.path:
        sys.path.insert(0, place)

PLACES = {
    "kernels": "benchmark_gpu_kernels",
    "memory": "benchmark_gpu_kernels",
    "train": "benchmark_gpu_models",
    "score": "benchmark_gpu_models",
    "steps": "benchmark_gpu_steps",
    "fp8": "benchmark_gpu_steps",
}


def main(arguments: list[str]) -> int:
    part, device, sizes, out = arguments
    from benchmark_gpu_common import SIZES, Bench, Report

    bench = Bench(device, SIZES[sizes])
    getattr(importlib.import_module(PLACES[part]), part)(bench, Report(Path(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
