"""What holds for the whole suite: which tests are slow, and what is shared until its end."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that wait by spinning take a busy machine's time from each other

from tests import distributed  # noqa: E402 -- imports torch, which counts its threads

TESTS = Path(__file__).parent
# Whole runs, engines, servers and every layout of every family: `make test-quick` leaves them out. A module or folder a
# line; a single slow test of a quick module has the mark itself.
SLOW = (
    "checkpoint/test_resume_layouts.py",
    "commands",
    "commands/test_init.py",
    "examples/test_notebook.py",
    "extending",
    "models",
    "parallel/test_context.py",
    "pretended_gpu",
    "records/test_responses.py",
    "report/test_browser.py",
    "rollout/megatron/test_engine.py",
    "rollout/vllm/test_colocate.py",
    "rollout/vllm/test_families.py",
    "rollout/vllm/test_server.py",
    "scoring/test_hidden_payload.py",
    "tools",
    "trackers/test_trackers.py",
    "training/test_carry_over.py",
    "training/test_context_step.py",
    "training/test_engine_sleep.py",
    "training/test_fused_head.py",
    "training/test_long_answer.py",
    "training/test_methods.py",
    "training/test_progress.py",
    "training/test_resume.py",
    "training/test_resume_processes.py",
    "training/test_step.py",
    "training/test_teachers.py",
    "training/test_transformer_engine_runs.py",
    "weights/test_weights.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [path for path in SLOW if not (TESTS / path).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: SLOW names {missing}, which are not there")
    for item in items:
        path = item.path.relative_to(TESTS).as_posix()
        if path.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # a million objects of imported libraries, which every later collection would go through


def pytest_sessionfinish() -> None:
    distributed.close()
    gc.unfreeze()  # else the interpreter's end takes libraries' objects for leaks
