"""The Triton kernels through Triton's interpreter, and the torch path beside them, against float64 references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opd.kernels import kernel_backend, set_kernels, shard_stats
from tests.distributed import LIMIT_S
from tests.kernels import checks
from tests.kernels.checks import Case

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("normal", "ties", "infinities", "nans")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    if not pytest.importorskip("triton", reason="Triton is not installed; it comes with the extras gpu and vllm-cpu"):
        return None
    out = tmp_path_factory.mktemp("interpreted") / "found.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("what", ["stats", "parts", "backward", "head", "too many", "backend"])
def test_the_triton_kernels_in_the_interpreter(what, interpreted):
    chosen = {name: problem for name, problem in interpreted.items() if name.startswith(what)}
    assert chosen
    failed = {name: problem for name, problem in chosen.items() if problem}
    assert not failed, "\n".join(f"{name}:\n{problem}" for name, problem in failed.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_path(kind, dtype):
    for k in (0, 1, 4, 16, 64):
        checks.check_stats(Case(5, 3000, 2987, k, n=5, kind=kind, dtype=dtype))
    checks.check_backward(Case(5, 300, 287, 0, n=16, dtype=dtype))
    checks.check_backward(Case(5, 300, 300, 0, n=1, dtype=dtype, inplace=False, strided=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_head_in_torch(dtype):
    case = Case(23, 150, 140, 0, n=16, dtype=dtype)
    for chunk in (1, 5, 64):
        checks.check_head(case, 32, chunk)
    checks.check_head(replace(case, real=150), 32, 5)


@pytest.mark.parametrize("k, real", [(-1, 10), (11, 10), (1, 21)])
def test_what_cannot_be_meant_is_refused(k, real):
    with pytest.raises(ValueError, match=f"real_columns {real}"):
        shard_stats(torch.zeros(2, 20), k, None, real)


def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    set_kernels("triton")
    try:
        with pytest.raises(RuntimeError, match="loss.kernels: triton cannot run on cpu"):
            kernel_backend("cpu")
    finally:
        set_kernels("auto")
    assert kernel_backend("cpu") == "torch"


def test_a_gpu_without_triton_is_an_error_that_names_the_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    with pytest.raises(RuntimeError, match="loss.kernels: auto needs the package triton"):
        kernel_backend("cuda")
