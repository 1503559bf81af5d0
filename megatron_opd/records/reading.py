"""Names of the files that records are in, and reading them. Needs no torch."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"
POSITIONS = "positions.jsonl"
RESPONSES = "responses"
LOCK = "lock.json"  # its time of change is the heartbeat of the job that owns the folder
STALE_S = 300.0  # without a heartbeat for so long, an owner on another machine counts as dead
NAME = re.compile(r"step_(\d+)\.json\.gz")


def recorded(folder: Path) -> dict[int, Path]:
    """The files by their steps, in order."""
    if not folder.is_dir():
        return {}
    named = ((NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def read_responses(path: Path) -> dict[str, Any] | None:
    """One step's file; None where it is torn or something else."""
    try:
        whole = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError, RecursionError):
        return None
    good = (
        isinstance(whole, dict) and isinstance(whole.get("responses"), list) and isinstance(whole.get("tokens"), dict)
    )
    return whole if good else None
