"""Writes the table of the slowest tests into tests/README.md, from the output of a whole run.

make test 2>&1 | tee /tmp/full.log;  python -m tests.slowest /tmp/full.log "two cores, nothing else running"
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).with_name("README.md")
HEADING = "## The twenty slowest\n"
LINE = re.compile(r"^([\d.]+)s (setup|call|teardown) +(\S+)$", re.MULTILINE)
SUMMARY = re.compile(r"^(?:=+ )?(\d.* in ([\d.]+)s.*?)(?: =+)?$", re.MULTILINE)


def section(log: str, machine: str) -> str:
    """The README's last section. Raises ValueError where the log is not that of a run with --durations=20 or more."""
    slowest, total = LINE.findall(log)[:20], SUMMARY.search(log)
    if len(slowest) < 20 or total is None:
        raise ValueError(f"{len(slowest)} durations in the log; it must end a run of pytest with --durations=20")
    lines = [
        HEADING,
        f"Of {float(total[2]) / 60:.1f} minutes ({machine}). A set-up is shared by the tests of its module.\n",
        "| seconds | part | test |",
        "|---|---|---|",
        *(f"| {float(seconds):.0f} | {part} | `{name.removeprefix('tests/')}` |" for seconds, part, name in slowest),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before = README.read_text().partition(HEADING)[0]
    README.write_text(before + section(Path(sys.argv[1]).read_text(), sys.argv[2]))
