"""A run's folder, read: also one of a run under way, or cut short. Nothing of it is trusted, and nothing written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_opd.errors import InputError
from megatron_opd.records.lines import METRICS, read_objects, read_steps
from megatron_opd.records.reading import LOCK, POSITIONS, RESPONSES, STALE_S, STARTS, read_responses, recorded


@dataclass
class RunFolder:
    """See the module. Raises InputError where the folder has no trace of a run."""

    path: Path
    name: str = ""

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.name = self.name or self.path.resolve().name
        if not is_run(self.path):
            where = "is no folder" if not self.path.is_dir() else f"has neither {METRICS} nor config.yaml"
            raise InputError(f"{self.path}: no run of megatron-opd: it {where}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml as it stands there; {} where there is none, or none that can be read."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self._lines(METRICS)

    @cached_property
    def positions(self) -> list[dict[str, Any]]:
        """The lines of positions.jsonl."""
        return self._lines(POSITIONS)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """One object for each start of the run."""
        try:
            return read_objects(self.path / STARTS)
        except OSError:
            return []

    @property
    def recorded(self) -> dict[int, Path]:
        """Files of recorded responses by their steps."""
        return recorded(self.path / RESPONSES)

    def responses(self) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Step, texts of tokens and one response, of all that were recorded; torn files are passed over."""
        for step, path in self.recorded.items():
            if (whole := read_responses(path)) is not None:
                for response in whole["responses"]:
                    if isinstance(response, dict):
                        yield step, whole["tokens"], response

    @property
    def wanted_steps(self) -> int | None:
        """train.steps, where the config says so."""
        train = self.config.get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def state(self) -> str:
        """running, finished, or ended: before its last step."""
        lock = self.path / LOCK
        try:
            if time.time() - os.lstat(lock).st_mtime < STALE_S:
                return "running"
        except OSError:
            pass
        return "finished" if self.wanted_steps and self.last_step >= self.wanted_steps else "ended"

    @property
    def accuracy(self) -> dict[str, float]:
        """Of each data set, the last that was measured."""
        newest: dict[str, float] = {}
        for step in self.steps:
            if isinstance(step.get("accuracy"), dict):
                newest |= {k: v for k, v in step["accuracy"].items() if isinstance(v, int | float)}
        return newest

    @property
    def job(self) -> str:
        return str(self.starts[-1].get("job") or "") if self.starts else ""

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            return read_steps(self.path / name)
        except OSError:
            return []


def is_run(path: Path) -> bool:
    return (path / METRICS).is_file() or (path / "config.yaml").is_file()


def find_runs(root: Path, depth: int = 4) -> list[RunFolder]:
    """The runs in a folder and its folders, the folder itself included, sorted by path. Raises InputError where it is
    none."""
    if not root.is_dir():
        raise InputError(f"{root}: is no folder")
    runs: list[RunFolder] = []

    def look(folder: Path, left: int) -> None:
        if is_run(folder):
            name = os.path.relpath(folder, root)
            runs.append(RunFolder(folder, folder.resolve().name if name == "." else name))
            return
        if left:
            for inner in sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()):
                look(inner, left - 1)

    try:
        look(root, depth)
    except OSError as error:
        raise InputError(f"{root}: cannot be read: {error.strerror}") from error
    return runs


def flat_settings(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A config's keys with dots and their values as text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
