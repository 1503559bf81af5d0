"""The file of judged responses: to be read by people, and by an evaluation that goes on after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_opd.evaluation.metrics import Answer
from megatron_opd.rollout.base import Request


def request_key(identity: dict[str, Any], seed: int, policy_version: int, model_id: str, request: Request) -> str:
    """A hash of everything that decides a response and its verdict, so that none is taken for another."""
    prompt = request.prompt
    parts = [identity, seed, policy_version, model_id, request.index, prompt.uid, prompt.tokens, prompt.answer]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def answer_of(record: dict[str, Any]) -> Answer:
    """What the metrics need of a saved record."""
    return Answer(**{name: record[name] for name in Answer.__dataclass_fields__})


class ResponseFile:
    """JSONL, one judged response a line, written in chunks."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, keys: set[str]) -> dict[str, dict[str, Any]]:
        """Reads the finished records among `keys` and leaves the file holding exactly these.

        A half-written line is dropped. Records of other settings go, with the whole old file, to NAME.old.jsonl.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        found: dict[str, dict[str, Any]] = {}
        foreign = False
        lines = self.path.read_bytes().splitlines(keepends=True)
        for line in lines:
            try:
                record = json.loads(line)
                complete = line.endswith(b"\n") and isinstance(record, dict) and "key" in record
            except ValueError:
                complete = False
            if not complete:
                continue
            if record["key"] in keys:
                found[record["key"]] = record
            else:
                foreign = True
        if foreign:
            shutil.copyfile(self.path, self.path.with_suffix(".old.jsonl"))
        if len(found) < len(lines):
            partial = self.path.with_name(self.path.name + ".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in found.values())
            os.replace(partial, self.path)
        return found

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and sees them onto the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
