"""What a run's metrics.jsonl says: `python tools/metrics.py RUN_DIR ...`

One table a run: mean, least, most and last of every number, and the share of the steps' time that phases account for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmark.common import print_table

from megatron_opd.training.clock import PHASE_KEYS
from megatron_opd.training.metrics_log import read_steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    for run in parser.parse_args().runs:
        path = run / "metrics.jsonl"
        if not path.is_file():
            print(f"{path} does not exist: give a run_dir", file=sys.stderr)
            return 2
        show(run, read_steps(path))
    return 0


def show(run: Path, steps: list[dict]) -> None:
    rows = []
    for key in steps[-1]:
        values = [s[key] for s in steps if isinstance(s.get(key), int | float)]
        if values and key != "step":
            rows.append([key, *(f"{v:.4g}" for v in (sum(values) / len(values), min(values), max(values), values[-1]))])
    print_table(f"{run}: {len(steps)} steps", ("", "mean", "least", "most", "last"), rows)
    total = sum(s["step_s"] for s in steps)
    print(
        f"phases: {100 * sum(s.get(p, 0.0) for s in steps for p in PHASE_KEYS) / total:.2f}% of {total:.1f} s of steps"
    )


if __name__ == "__main__":
    sys.exit(main())
