"""One part of the GPU benchmark, in this process: PART DEVICE SIZES OUT. Started by `benchmark.py gpu`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
for place in (str(TOOLS), str(TOOLS.parent)):
    if place not in sys.path:
        sys.path.insert(0, place)

PLACES = {
    "kernels": "benchmark.gpu_kernels",
    "memory": "benchmark.gpu_kernels",
    "train": "benchmark.gpu_models",
    "score": "benchmark.gpu_models",
    "steps": "benchmark.gpu_steps",
    "fp8": "benchmark.gpu_steps",
}


def main(arguments: list[str]) -> int:
    part, device, sizes, out = arguments
    from benchmark.gpu_common import SIZES, Bench, Report

    bench = Bench(device, SIZES[sizes])
    getattr(importlib.import_module(PLACES[part]), part)(bench, Report(Path(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
