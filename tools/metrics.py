"""What a run's metrics.jsonl says: `python tools/metrics.py RUN_DIR ...`

One table a run: mean, least, most and last of every number, and the share of the steps' time that phases account for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.common import print_table

from megatron_opd.records.lines import read_steps
from megatron_opd.training.clock import PHASE_KEYS

LARGEST = sys.float_info.max  # what is larger is no number of a run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    for run in parser.parse_args().runs:
        path = run / "metrics.jsonl"
        try:
            steps = read_steps(path)
        except OSError as error:
            print(f"{path} cannot be read: {error.strerror}; give a run_dir", file=sys.stderr)
            return 2
        if not steps:
            print(f"{path} holds no step", file=sys.stderr)
            return 2
        show(run, steps)
    return 0


def numbers(steps: list[dict], key: str) -> list[float]:
    """What the steps have under a key, where it is a number."""
    return [s[key] for s in steps if isinstance(s.get(key), int | float) and abs(s[key]) < LARGEST]


def show(run: Path, steps: list[dict]) -> None:
    rows = []
    for key in steps[-1]:
        values = numbers(steps, key)
        if values and key != "step":
            rows.append([key, *(f"{v:.4g}" for v in (sum(values) / len(values), min(values), max(values), values[-1]))])
    print_table(f"{run}: {len(steps)} steps", ("", "mean", "least", "most", "last"), rows)
    total = sum(numbers(steps, "step_s"))
    if total:
        phases = sum(sum(numbers(steps, phase)) for phase in PHASE_KEYS)
        print(f"phases: {100 * phases / total:.2f}% of {total:.1f} s of steps")


if __name__ == "__main__":
    sys.exit(main())
