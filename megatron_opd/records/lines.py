"""Files with one JSON object a step, such as RUN/metrics.jsonl: strict JSON, no torn line, no step twice."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_opd.files import write_whole

METRICS = "metrics.jsonl"


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """The steps that such a file holds, in the order of their numbers. Raises OSError, also for what is no path.

    What is no step's line (torn, of other bytes, no object, without a whole number as its `step`) is passed over; of
    lines of the same step the last one counts. A crash of a node or of its disk leaves such lines.
    """
    steps: dict[int, dict[str, Any]] = {}
    for values in read_objects(path):
        step = values.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            steps[step] = values
    return [steps[step] for step in sorted(steps)]


def read_objects(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; other lines are passed over. Raises OSError, also for what is no path."""
    try:
        text = Path(path).read_bytes()
    except ValueError as error:  # a null byte, half of a character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    objects = []
    for line in text.split(b"\n"):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            continue
        if isinstance(values, dict):
            objects.append(values)
    return objects


def strict(value: Any) -> Any:
    """The value for strict JSON, which has no word for what is not finite: such numbers become null."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepLines:
    """Such a file, open for writing. Only the writing rank has one. Lines that could not be written are kept and
    written with a later one."""

    def __init__(self, path: Path, first_step: int) -> None:
        """After a resume, steps from `first_step` on are run again: their old lines go, and what is no step's line.
        Raises OSError."""
        self.path = path
        if os.path.lexists(path):
            steps = read_steps(path) if path.exists() else []  # a link to nothing
            write_whole(path, [_line(values) for values in steps if values["step"] < first_step])
        self.descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
        self._unwritten: list[str] = []

    def add(self, values: dict[str, Any]) -> str:
        """One step's line, with its "step"; returns what is wrong with the disk, if anything."""
        self._unwritten.append(_line(values))
        return self._write()

    def _write(self) -> str:
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

    def close(self) -> None:
        self._write()
        os.close(self.descriptor)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(strict(values), allow_nan=False) + "\n"
