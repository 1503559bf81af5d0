"""A run's numbers on disk: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_opd.files import write_whole

FILE = "metrics.jsonl"


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """The steps that a metrics.jsonl holds, in the order of their numbers. Raises OSError, also for what is no path.

    What is no step's line (torn, of other bytes, no object, without a whole number as its `step`) is passed over; of
    lines of the same step the last one counts. A crash of a node or of its disk leaves such lines.
    """
    steps: dict[int, dict[str, Any]] = {}
    try:
        text = Path(path).read_bytes()
    except ValueError as error:  # a null byte, half of a character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    for line in text.split(b"\n"):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            continue
        step = values.get("step") if isinstance(values, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            steps[step] = values
    return [steps[step] for step in sorted(steps)]


def strict(value: Any) -> Any:
    """The value for strict JSON, which has no word for what is not finite: such numbers become null."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_warning(metrics: dict[str, Any], text: str) -> None:
    """Adds to what a step's line warns of."""
    if text:
        metrics["warning"] = "; ".join(filter(None, (metrics.get("warning"), text)))


class MetricsLog:
    """RUN/metrics.jsonl, one object a step, and TensorBoard beside it. Only the writing rank has one.

    TensorBoard is a view of what metrics.jsonl holds: where it fails, the run goes on without it.
    """

    def __init__(self, run_dir: str, first_step: int) -> None:
        self.path = Path(run_dir, FILE)
        self._drop_from(first_step)
        self.descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
        self._unwritten: list[str] = []
        self._warning = ""  # of TensorBoard, until a step's line has it
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(run_dir, "tensorboard")), purge_step=first_step)
        except Exception as error:  # a client of another project: whatever it raises
            self._warning = f"no TensorBoard: {type(error).__name__}: {error}"

    def _drop_from(self, step: int) -> None:
        """After a resume, steps behind the checkpoint are run again: their old lines go, and what is no step's line."""
        if not os.path.lexists(self.path):
            return
        steps = read_steps(self.path) if self.path.exists() else []  # a link to nothing
        kept = [json.dumps(strict(values)) + "\n" for values in steps if values["step"] < step]
        write_whole(self.path, kept)

    def write(self, values: dict[str, Any]) -> str:
        """Adds a step's line; returns what is wrong with the disk, if anything. When TensorBoard has failed, the line
        says so once, as its `warning`.

        Lines that could not be written are kept and written with a later one.
        """
        for name, value in values.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    self._plot(f"{name}/{inner}", number, values["step"])
            elif name != "step":
                self._plot(name, value, values["step"])
        add_warning(values, self._warning)
        self._warning = ""
        self._unwritten.append(json.dumps(strict(values), allow_nan=False) + "\n")
        return self._write_lines()

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

    def _plot(self, name: str, value: Any, step: int) -> None:
        if self.board is None or not isinstance(value, int | float):
            return
        try:
            self.board.add_scalar(name, value, step)
        except Exception as error:  # its writing thread has met a full disk and is gone, or anything else
            self.board = None
            self._warning = f"TensorBoard has failed and gets nothing more: {type(error).__name__}: {error}"

    def close(self) -> None:
        self._write_lines()
        os.close(self.descriptor)
        if self.board is not None:
            try:
                self.board.close()
            except Exception as error:
                print(f"WARNING: TensorBoard's files may lack the last steps: {type(error).__name__}: {error}")


def was_reported(run_dir: str, step: int) -> bool:
    """Whether RUN/metrics.jsonl has a whole line of this step."""
    path = Path(run_dir, FILE)
    return path.exists() and any(values["step"] == step for values in read_steps(path))
