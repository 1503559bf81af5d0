"""No file that a command reads runs code of whoever wrote it: a malicious pickle in each, with every reader of it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.pickles import PARTS, Payload, saved
from tests.distributed import LIMIT_S
from tests.tiny_run import REPOSITORY, child_environment

BIN = "pytorch_model.bin"
READERS = [
    *(f"{command}: {BIN}" for command in ("convert", "eval", "doctor")),
    f"convert: {BIN}, allowed",
    *(f"train: {part}'s {BIN}{allowed}" for part in ("student", "teacher") for allowed in ("", ", allowed")),
    *(f"train: {part}/, {how}" for part in ("megatron", "optimizer") for how in PARTS),
    *(f"{command}: megatron/, {how}" for command in ("eval", "convert") for how in PARTS),
    "train: tokenizer.model",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.commands.pickles", str(tmp_path_factory.mktemp("pickles"))],
        cwd=REPOSITORY,
        # torch's own guard off: files that it loads by default run code then
        env=child_environment() | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stderr
    report: dict[str, dict[str, Any]] = json.loads(ended.stdout)
    return report


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_refused_and_does_not_run(report: dict[str, dict[str, Any]], reader: str) -> None:
    outcome = report[reader]
    assert not outcome["ran"]
    assert outcome["code"] in (1, 2, 3), outcome
    if "megatron/" in reader or "optimizer/" in reader:
        assert ": refused" in outcome["said"]


def test_a_type_that_arrow_once_unpickled_is_a_plain_column(report: dict[str, dict[str, Any]]) -> None:
    assert not report["train: a type of Arrow's"]["ran"]


def test_every_reader_is_looked_at(report: dict[str, dict[str, Any]]) -> None:
    assert {*report} == {*READERS, "train: a type of Arrow's"}


def test_the_pickle_would_run(tmp_path: Path) -> None:
    import torch

    pickle.loads(pickle.dumps(Payload(tmp_path / "plain")))
    (tmp_path / "file").write_bytes(saved(Payload(tmp_path / "saved")))
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "plain").is_dir() and (tmp_path / "saved").is_dir()
