"""Which implementation runs: one setting, `loss.kernels` of the config, made effective by `set_kernels`."""

from __future__ import annotations

import os
from typing import Literal

import torch

Choice = Literal["auto", "torch", "triton"]
Backend = Literal["torch", "triton"]

_choice: Choice = "auto"


def set_kernels(choice: Choice) -> None:
    """Makes `loss.kernels: choice` the setting of this process, for every kernel of the package."""
    global _choice
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"loss.kernels: {choice!r} is unknown; one of auto, torch, triton")
    _choice = choice


def kernel_backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """What runs on tensors of `device`: auto means Triton on a GPU and torch elsewhere.

    float64, which exists to check the others, is torch's always. Raises RuntimeError, naming the key, where Triton is
    meant and cannot run: it is not installed, or the tensors are on the CPU and Triton's interpreter is not on.
    """
    kind = torch.device(device).type
    if dtype == torch.float64 or _choice == "torch" or (_choice == "auto" and kind != "cuda"):
        return "torch"
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"loss.kernels: triton cannot run on {kind} tensors; set auto or torch (TRITON_INTERPRET=1, before the "
            "start, runs the kernels slowly through Triton's interpreter)"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"loss.kernels: {_choice} needs the package triton on a GPU, and it cannot be imported ({error}); install "
            "the build of triton that belongs to this torch, or set loss.kernels: torch"
        ) from error
    return "triton"
