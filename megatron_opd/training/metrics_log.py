"""A run's numbers on disk: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class MetricsLog:
    """RUN/metrics.jsonl, one object a step, and TensorBoard beside it. Only the writing rank has one."""

    def __init__(self, run_dir: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(run_dir, "metrics.jsonl")
        self._drop_from(first_step)
        self.descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._unwritten: list[str] = []
        self.board: SummaryWriter | None = SummaryWriter(str(Path(run_dir, "tensorboard")), purge_step=first_step)

    def _drop_from(self, step: int) -> None:
        """After a resume, steps behind the checkpoint are run again: their old lines go, and a torn last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        scratch = self.path.with_suffix(".jsonl.tmp")
        scratch.write_text("".join(kept), encoding="utf-8")
        os.replace(scratch, self.path)

    def write(self, values: dict[str, Any]) -> str:
        """Adds a step's line; returns what is wrong with the disk, if anything.

        Lines that could not be written are kept and written with a later one.
        """
        self._unwritten.append(json.dumps(values) + "\n")
        problem = self._write_lines()
        for name, value in values.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    self._plot(f"{name}/{inner}", number, values["step"])
            elif isinstance(value, int | float) and name != "step":
                self._plot(name, value, values["step"])
        return problem

    def _write_lines(self) -> str:
        while self._unwritten:
            line = self._unwritten[0].encode()
            end = os.lseek(self.descriptor, 0, os.SEEK_END)
            try:
                if os.write(self.descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self.descriptor, end)  # no torn line stays
                return f"{self.path.name} lacks {len(self._unwritten)} line(s): {error.strerror}"
            self._unwritten.pop(0)
        return ""

    def _plot(self, name: str, value: float, step: int) -> None:
        if self.board is not None:
            try:
                self.board.add_scalar(name, value, step)
            except OSError:  # its writing thread has met a full disk and is gone; metrics.jsonl has every number
                self.board = None

    def close(self) -> None:
        self._write_lines()
        os.close(self.descriptor)
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


def was_reported(run_dir: str, step: int) -> bool:
    """Whether RUN/metrics.jsonl has a whole line of this step."""
    path = Path(run_dir, "metrics.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines()[::-1] if path.exists() else ():
        try:
            if json.loads(line)["step"] == step:
                return True
        except (ValueError, KeyError):
            continue
    return False
