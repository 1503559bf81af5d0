"""The file of judged responses: to be read by people, and by an evaluation that goes on after an interruption."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_opd.evaluation.metrics import JudgedResponse
from megatron_opd.files import write_whole
from megatron_opd.rollout.base import Request


def request_key(parameters: str, sampling: dict[str, Any], request: Request) -> str:
    """A hash of everything that decides a response: the fingerprint of the parameters, how is sampled, the prompt's
    tokens, and the index, which seeds the sampler. Verdicts are not part of it; they are made anew each time."""
    parts = [parameters, sampling, request.index, request.prompt.tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def old_name(path: Path) -> Path:
    """A free name for what stood at `path`: NAME.old.jsonl, NAME.old2.jsonl, ..."""
    names = (path.with_suffix(f".old{number if number > 1 else ''}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def judged_response(record: dict[str, Any]) -> JudgedResponse:
    """What the metrics need of a saved record."""
    return JudgedResponse(**{name: record[name] for name in JudgedResponse.__dataclass_fields__})


class ResponseFile:
    """JSONL, one judged response a line, written in chunks."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, keys: set[str]) -> tuple[dict[str, dict[str, Any]], int]:
        """Reads the finished records among `keys` and leaves the file holding exactly these.

        A half-written line is dropped. Where there are records of other parameters, prompts or settings, the whole old
        file is kept beside it.

        Returns the records by key, and how many others there were.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finished: dict[str, dict[str, Any]] = {}
        others = 0
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
                complete = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("key"), str)
            except (ValueError, RecursionError):
                complete = False
            if not complete:
                continue
            if record["key"] in keys:
                finished[record["key"]] = record
            else:
                others += 1
        if others:
            self.keep_old()
        if len(finished) < len(lines) or not self.path.exists() or self.path.is_symlink():
            self.rewrite(list(finished.values()))
        return finished, others

    def keep_old(self) -> None:
        """Copies the file to a name beside it."""
        shutil.copyfile(self.path, old_name(self.path))

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """Leaves the file holding exactly these, whole or not at all."""
        write_whole(self.path, (_line(record) for record in records))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and sees them onto the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
