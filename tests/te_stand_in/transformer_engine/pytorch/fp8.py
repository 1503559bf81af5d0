"""The state of FP8: which recipe runs where, and the scales of delayed scaling."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor

E4M3_MAX = 448.0


class FP8GlobalStateManager:
    enabled = False
    recipe = None
    parameters = False  # modules are being made with FP8 parameters
    keep_initial = False  # ... and keep what these were made from
    depth = 0
    scales: list[Scale] = []  # of every module that has run with delayed scaling
    entered: list[str] = []  # recipes of all contexts so far, for tests

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled


class Scale:
    """One tensor's scale under delayed scaling: 1 until a pass with gradients has ended."""

    def __init__(self) -> None:
        self.scale, self.amax = 1.0, 0.0
        FP8GlobalStateManager.scales.append(self)

    def update(self) -> None:
        if self.amax > 0:
            self.scale = E4M3_MAX / self.amax
        self.amax = 0.0


def rounded(values: Tensor, delayed: Scale | None) -> Tensor:
    """Through e4m3 and back. Without `delayed` the scale is the tensor's own."""
    peak = float(values.abs().max()) if values.numel() else 0.0
    scale = E4M3_MAX / peak if peak > 0 else 1.0
    if delayed is not None:
        scale, delayed.amax = delayed.scale, max(delayed.amax, peak)
    stored = (values.float() * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (stored.float() / scale).to(values.dtype)


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe
    state.enabled, state.recipe = enabled, fp8_recipe
    state.entered.append(type(fp8_recipe).__name__)
    state.depth += 1
    try:
        yield
    finally:
        state.enabled, state.recipe = before
        state.depth -= 1
        if enabled and state.depth == 0 and torch.is_grad_enabled():
            for scale in state.scales:
                scale.update()


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    state = FP8GlobalStateManager
    before = state.parameters, state.keep_initial
    state.parameters, state.keep_initial = enabled, preserve_high_precision_init_val
    try:
        yield
    finally:
        state.parameters, state.keep_initial = before
