"""Megatron-Core without a GPU: everything that it needs patched, in one table.

`apply_cpu_platform()` is called once, before models are built, where there is no GPU or `device: cpu` is set. It
changes names of `torch.cuda` that Megatron-Core asks for the current device, and names of Megatron-Core's own
modules. `PATCHED` lists the latter; a test checks that each still exists in the installed Megatron-Core.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "tensor", "empty_like", "full", "arange")

# Modules that write device="cuda" literally: their name `torch` is replaced by a stand-in that maps the device.
_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.utils",
)

# Functions that compare Tensor.type() with 'torch.cuda.FloatTensor': they see that type while they run.
_TYPE_STRINGS = (
    ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
)

# Activation recomputation saves and restores the CUDA generator; the CPU generator is saved beside it anyway.
_RNG = (
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
)
_TRACKER = "get_cuda_rng_tracker"

# Expert parallelism sends by split sizes that are numpy arrays on a GPU; on the CPU they would stay tensors.
_SPLITS = ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu")

PATCHED: tuple[tuple[str, str], ...] = (
    *((module, "torch") for module in _LITERAL_CUDA),
    *_TYPE_STRINGS,
    *_RNG,
    _SPLITS,
    ("megatron.core.tensor_parallel.random", _TRACKER),
    ("megatron.core.tensor_parallel.random", "_CUDA_RNG_STATE_TRACKER"),
    ("megatron.core.tensor_parallel.random", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
)

_applied = False


def use_cpu(device: str) -> bool:
    """Whether `device` (auto, cpu or cuda) means the CPU here.

    Raises:
        RuntimeError: `cuda` is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: cuda is set, but torch finds no GPU; set device: cpu or auto")
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def apply_cpu_platform() -> None:
    """Patches torch.cuda and Megatron-Core for the CPU. Further calls do nothing."""
    global _applied
    if _applied:
        return
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]

    stand_in = _TorchOnCpu()
    for name in _LITERAL_CUDA:
        _swap(name, "torch", stand_in)
    for module, name in _TYPE_STRINGS:
        _swap(module, name, _with_cuda_type_strings(_find(module, name)))
    _swap(*_RNG[0], lambda *args, **kwargs: torch.get_rng_state())
    _swap(*_RNG[1], lambda *args, **kwargs: None)
    _swap(*_SPLITS, _as_numpy)

    # The router of mixture-of-experts layers asks whether this is None, but it exists only with Transformer Engine.
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)  # type: ignore[attr-defined]

    from megatron.core.tensor_parallel import random

    tracker = NoRngTracker()
    random._CUDA_RNG_STATE_TRACKER = tracker
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    for name in _modules_that_hold(random.get_cuda_rng_tracker):
        _swap(name, _TRACKER, lambda *args, **kwargs: tracker)
    _applied = True


class NoRngTracker:
    """Stands in for the tracker of CUDA generators: dropout is off, initial weights come from checkpoints."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        pass

    def get_states(self) -> dict[str, Any]:
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        pass

    def add(self, name: str, seed: int) -> None:
        pass

    @contextlib.contextmanager
    def fork(self, name: str | None = None) -> Iterator[None]:
        yield


class _NoStream:
    """A CUDA stream where all work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or self  # what callers do with an event is to synchronize() it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0


class _TorchOnCpu(types.ModuleType):
    """The torch module, but tensors asked for on "cuda" are made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_cuda(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return call


def _with_cuda_type_strings(function: Callable[..., Any]) -> Callable[..., Any]:
    plain = torch.Tensor.type

    def as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain(self, *args, **kwargs)
        return plain(self).replace("torch.", "torch.cuda.")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.type = as_on_cuda  # type: ignore[method-assign,assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = plain  # type: ignore[method-assign]

    return call


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _find(module: str, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _swap(module: str, path: str, value: Any) -> None:
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    if not hasattr(owner, name):
        raise AttributeError(f"{module}.{path} is gone from this Megatron-Core; compat/cpu_platform.py needs an update")
    setattr(owner, name, value)


def _modules_that_hold(function: Any) -> list[str]:
    """Modules of Megatron-Core that imported `function` by its name."""
    import sys

    import megatron.core.models.gpt  # noqa: F401 -- loads every module that our models use

    names = []
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, _TRACKER, None) is function:
            names.append(name)
    return names
