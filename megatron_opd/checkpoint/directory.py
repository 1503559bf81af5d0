"""Checkpoints as directories: whole or absent.

    RUN/checkpoints/step_000020/    also a converted directory: `--checkpoint`, `student.model` and
                                    `tools/convert.py export` take it
        megatron/                   the student's parameters
        optimizer/                  Adam's moments and fp32 parameters
        carried.safetensors         responses under way (rollout.carry_over), if there are any
        state.json                  step, budget, data position, totals, scheduler, random number generators
        config.json, tokenizer, ... of the student
        megatron_opd.json           written last: sizes of all files, digests of state.json and
                                    carried.safetensors; without it the
                                    directory is incomplete
    RUN/checkpoints/.step_000040.partial/   a save in progress, or one that was interrupted

A directory gets its final name when everything in it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.files import remove_tree
from megatron_opd.weights.converted import CHECKPOINT, MANIFEST, manifest_problem

PARAMETERS = CHECKPOINT
OPTIMIZER = "optimizer"
STATE = "state.json"
CARRIED = "carried.safetensors"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint directory and what is wrong with it, if anything."""

    path: Path
    step: int
    problem: str  # empty: complete


def checkpoints_dir(run_dir: str | Path) -> Path:
    return Path(run_dir, "checkpoints")


def final_path(root: Path, step: int) -> Path:
    return root / f"step_{step:06d}"


def partial_path(root: Path, step: int) -> Path:
    return root / f".step_{step:06d}.partial"


def find(root: Path) -> list[SavedCheckpoint]:
    """All checkpoints under `root`, newest first, each checked against its list of files."""
    if not root.is_dir():
        return []
    named = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [SavedCheckpoint(path, step, problem_of(path)) for step, path in sorted(named, reverse=True)]


def problem_of(path: Path) -> str:
    """What is missing or cut short; empty for a complete checkpoint."""
    try:
        if not any(path.iterdir()):
            return "the directory is empty"
        manifest = read_manifest(path)
        files, _ = dict(manifest["checkpoint"]["files"]), dict(manifest["checkpoint"]["model"])
        # Checkpoints of version 0.1 have none.
        digests = {
            STATE: manifest["checkpoint"].get("state_digest"),
            CARRIED: manifest["checkpoint"].get("carried_digest"),
        }
    except FileNotFoundError:
        return f"{MANIFEST} is missing: its writing was interrupted"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not readable"
    if problem := manifest_problem(manifest):
        return f"{MANIFEST}: {problem}"
    for name, size in files.items():
        try:
            actual = (path / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    for name, digest in digests.items():
        if digest is not None and _digest(path / name) != digest:
            return f"{name} is not the one that was saved"
    return ""


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def remove_partial(root: Path) -> list[str]:
    """Removes what interrupted saves have left; returns the names."""
    left = sorted(root.glob(".step_*.partial")) if root.is_dir() else []
    for path in left:
        remove_tree(path)
    return [path.name for path in left]


def seal(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Everything to disk, the marker last, then the final name. A damaged directory of that name is removed.

    Raises OSError; the directory then keeps its partial name.
    """
    names = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(partial)): path.stat().st_size for path in names}
    for path in names:
        _sync(path)
    marker = partial / MANIFEST
    more = {"files": files, "state_digest": _digest(partial / STATE)}
    if CARRIED in files:
        more["carried_digest"] = _digest(partial / CARRIED)
    manifest = {**manifest, "checkpoint": {**manifest["checkpoint"], **more}}
    marker.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(marker)
    for folder in (*[path for path in partial.rglob("*") if path.is_dir()], partial):
        _sync(folder)
    if final.is_symlink():
        final.unlink()
    elif final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def remove_old(root: Path, keep_last: int, keep_every: int) -> None:
    """Removes complete checkpoints beyond the newest `keep_last`, except multiples of `keep_every`."""
    complete = [checkpoint for checkpoint in find(root) if not checkpoint.problem]
    for old in complete[keep_last:]:
        if keep_every and old.step % keep_every == 0:
            continue
        # Renamed first: a half removed directory must not look like a checkpoint.
        doomed = old.path.with_name(f".{old.path.name}.partial")
        old.path.rename(doomed)
        remove_tree(doomed)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
