"""Runs checks in a process of its own, whose Triton is the interpreter: python -m tests.kernels.interpreted OUT.json

The interpreter must be chosen before Triton is imported, and whatever else this process imports would import it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from megatron_opd.kernels import backend, kernel_backend, set_kernels, triton_launch  # noqa: E402
from tests.kernels import checks  # noqa: E402
from tests.kernels.checks import Case  # noqa: E402

HALF, SINGLE = torch.float16, torch.float32


def _fast_xor() -> None:
    """The interpreter loops in Python over reductions that it does not know; sorting is made of xor."""
    plain = interpreter.ReduceOps.apply_impl

    def apply(self, values):
        if self.combine_fn is not tl.standard._xor_combine:
            return plain(self, values)
        reduced = np.bitwise_xor.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(reduced, values[0].dtype)

    interpreter.ReduceOps.apply_impl = apply


def _constants_in_bf16() -> None:
    """The interpreter of Triton 3.7, which torch 2.13 for CUDA brings, makes constants of every float but this."""

    def get_bf16(self, value):
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    if not hasattr(interpreter.InterpreterBuilder, "get_bf16"):
        interpreter.InterpreterBuilder.get_bf16 = get_bf16


def stats_in_parts(case: Case) -> None:
    """Few rows: each is split over several programs, the last of which may have fewer columns than k."""
    before = triton_launch._PART
    triton_launch._PART = 1024
    try:
        checks.check_stats(case)
    finally:
        triton_launch._PART = before


def backend_of() -> None:
    assert kernel_backend("cpu") == "triton" and kernel_backend("cpu", torch.float64) == "torch"
    set_kernels("auto")
    assert kernel_backend("cpu") == "torch" and kernel_backend("cuda") == "triton"
    set_kernels("torch")
    assert kernel_backend("cuda") == "torch"
    assert backend._choice == "torch"


def too_many() -> None:
    try:
        checks.check_stats(Case(1, 3000, 3000, 257))
    except ValueError as error:
        assert "257" in str(error) and "loss.kernels" in str(error)
    else:
        raise AssertionError("k 257 was taken")


def _name(check: str, case: Case) -> str:
    return f"{check} {case.kind} {str(case.dtype)[6:]} {case.rows}x{case.width}/{case.real} k{case.k} n{case.n}"


CHECKS = (
    {
        _name("stats", case): (checks.check_stats, (case,))
        for case in (
            Case(4, 1500, 1400, 1),
            Case(4, 1500, 1500, 16, n=17, strided=True),
            Case(2, 5999, 5995, 64, n=1),
            Case(3, 1500, 1400, 16, kind="ties"),
            Case(3, 1501, 1397, 4, kind="ties", dtype=HALF),
            Case(5, 1500, 1400, 16, kind="infinities"),
            Case(5, 203, 133, 16, kind="infinities", dtype=SINGLE),
            Case(5, 1500, 1403, 4, kind="nans", strided=True),
            Case(5, 203, 133, 1, kind="nans", dtype=SINGLE),
            Case(5, 2100, 2049, 16, kind="nans", dtype=HALF),
            Case(2, 2100, 2049, 64, kind="normal", dtype=SINGLE),
            Case(3, 64, 64, 64, kind="ties"),
            Case(2, 20, 17, 17, kind="normal"),
            Case(6, 900, 800, 0, kind="nans", n=5),
            Case(0, 900, 800, 4),
        )
    }
    | {
        _name("parts", case): (stats_in_parts, (case,))
        for case in (
            Case(2, 5000, 4900, 16),
            Case(2, 4200, 4097, 16, kind="ties", dtype=SINGLE),
            Case(5, 4200, 4097, 4, kind="infinities"),
            Case(5, 4200, 4097, 16, kind="nans"),
        )
    }
    | {
        _name("backward", case): (checks.check_backward, (case,))
        for case in (
            Case(4, 1500, 1400, 0, n=16),
            Case(4, 1500, 1500, 0, n=1, inplace=False),
            Case(4, 9001, 8997, 0, n=64, dtype=SINGLE, strided=True),
            Case(4, 200, 133, 0, n=17, dtype=HALF),
            Case(4, 40000, 39990, 0, n=4, inplace=False, strided=True),
        )
    }
    | {
        _name("head", case): (checks.check_head, (case, 16, 4))
        for case in (
            Case(10, 150, 140, 0, n=4),
            Case(9, 150, 150, 0, n=16, dtype=SINGLE),
        )
    }
    | {"too many": (too_many, ()), "backend": (backend_of, ())}
)  # the last one changes the setting


def main() -> None:
    _fast_xor()
    _constants_in_bf16()
    set_kernels("triton")
    found = {}
    for name, (check, arguments) in CHECKS.items():
        started = time.monotonic()
        try:
            check(*arguments)
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
        print(f"{time.monotonic() - started:6.2f} s  {name}", flush=True)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
