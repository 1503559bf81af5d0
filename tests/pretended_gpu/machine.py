"""A machine of pretended GPUs: torch.cuda, torch.distributed and modules that are moved, in a process of its own.

`pretended_gpus()` comes before Megatron-Core is imported. One process is one GPU, as under torchrun; collectives and
messages go through gloo, and refuse what NCCL would: tensors of two devices, and gaps between values.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretended_gpu import device
from tests.pretended_gpu.device import GPU, SEEN, Functions, Operators, Pretended, move, on_gpu

_COLLECTIVES = (
    "all_gather all_gather_into_tensor all_reduce all_to_all_single broadcast irecv isend recv reduce_scatter "
    "reduce_scatter_tensor send _all_gather_base _reduce_scatter_base"
).split()


@contextmanager
def pretended_gpus() -> Iterator[None]:
    """Inside, torch finds eight H100s; the patches stay afterwards, without effect on CPU tensors."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("torch._dynamo")  # makes tables of torch's functions, before they are replaced here
    _patch_cuda()
    _patch_tensors()
    _patch_collectives()
    with Operators(), Functions():
        yield


class _Properties:
    name, major, minor, multi_processor_count, total_memory = "NVIDIA H100 (pretended)", 9, 0, 132, 80 << 30


class Stream:
    """All work is done when the call returns; whoever waits for it is counted."""

    device, cuda_stream, stream_id = GPU, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = wait_stream

    def synchronize(self) -> None:
        SEEN.waits[device._place()] += 1

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    wait = record

    def synchronize(self) -> None:
        SEEN.waits[device._place()] += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Generators(tuple[torch.Generator]):
    """One generator, of the one GPU that a process uses, whatever names it."""

    def __new__(cls) -> _Generators:
        return super().__new__(cls, [torch.Generator()])

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)


class _Current:
    """The current stream of the process, which `torch.cuda.set_stream` changes."""

    stream = Stream()


def _patch_cuda() -> None:
    cuda: Any = torch.cuda

    def synchronize(*args: Any, **kwargs: Any) -> None:
        SEEN.waits[device._place()] += 1

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    answers = {
        "current_device": GPU,  # torch built for CPUs refuses a number
        "device_count": 8,
        "get_device_capability": (9, 0),
        "get_device_name": _Properties.name,
        "get_device_properties": _Properties(),
        "is_available": True,
        "is_bf16_supported": True,
        "is_initialized": True,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (60 << 30, 80 << 30),
        "memory_allocated": 0,
        "memory_reserved": 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    for name in ("_lazy_init", "empty_cache", "reset_peak_memory_stats", "set_device"):
        setattr(cuda, name, nothing)
    for name in ("device", "device_of", "stream"):
        setattr(cuda, name, lambda *args, **kwargs: nullcontext())
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.Stream, cuda.Event, cuda.synchronize = Stream, Event, synchronize
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Current.stream
    cuda.set_stream = lambda stream: setattr(_Current, "stream", stream)
    cuda.random._lazy_init, cuda.random.current_device = nothing, cuda.current_device  # imported there by name
    cuda.default_generators = _Generators()
    torch._C._ensureCUDADeviceGuardSet()


def _patch_tensors() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: move(self, GPU, **kwargs)
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = lambda self, *args: device.pin(self)
    tensor.is_pinned = lambda self, *args: device.is_pinned(self)
    module: Any = torch.nn.Module
    plain = module.to
    module.cuda = lambda self, *args: _move_module(self, True)
    module.to = lambda self, *args, **kwargs: (
        _move_module(self, on_gpu(args[0]))
        if args and isinstance(args[0], torch.device | str)
        else plain(self, *args, **kwargs)
    )


def _move_module(module: torch.nn.Module, to_gpu: bool) -> torch.nn.Module:
    """Parameters become new objects: a tensor cannot change its class."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None or isinstance(parameter.data, Pretended) == to_gpu:
                continue
            with _disable_current_modes():
                data = parameter.data if to_gpu else parameter.data.inner
            moved = torch.nn.Parameter(Pretended(data) if to_gpu else data, parameter.requires_grad)
            moved.__dict__.update({key: value for key, value in parameter.__dict__.items() if key != "inner"})
            part._parameters[name] = moved
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and isinstance(buffer, Pretended) != to_gpu:
                part._buffers[name] = Pretended(buffer) if to_gpu else buffer.inner
    return module


def _patch_collectives() -> None:
    for name in _COLLECTIVES:
        plain = getattr(dist, name, None)
        if plain is None:
            continue

        def call(*args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
            if len({isinstance(t, Pretended) for t in tensors}) > 1:
                raise RuntimeError(f"dist.{name}: tensors on cuda and on cpu at {device._place()}")
            inner = [device._inner(t) for t in tensors]
            if not all(t.is_contiguous() for t in inner):
                raise ValueError(f"Tensors must be contiguous (dist.{name} at {device._place()})")
            return plain(*tree_map(device._inner, args), **tree_map(device._inner, kwargs))

        setattr(dist, name, call)
        setattr(dist.distributed_c10d, name, call)
