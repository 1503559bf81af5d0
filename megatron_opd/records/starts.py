"""When a run was started, and resumed, and by whom: one line a start in RUN/starts.jsonl."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import megatron_opd
from megatron_opd.records.reading import STARTS


def add_start(run_dir: str, step: int, processes: int) -> None:
    """Step: the first that this start runs. Raises OSError."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "processes": processes,
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "version": megatron_opd.__version__,
        "torch": torch.__version__,
        "revision": git_revision(),
    }
    descriptor = os.open(Path(run_dir, STARTS), os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def git_revision() -> str:
    """Of the code that runs, where it lies in a git checkout; with "+" where it was changed since."""
    folder = Path(__file__).parents[2]

    def git(*words: str) -> Any:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(folder):  # a package installed inside somebody's checkout
        return ""
    revision = git("rev-parse", "--short=12", "HEAD") or ""
    return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
