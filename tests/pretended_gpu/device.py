"""Tensors that say "cuda:0" and compute on the CPU: a GPU without a GPU.

An operator that mixes them with CPU tensors raises as on a GPU, and what makes the host wait for the device, or copies
through pageable memory, is counted with the line of the package that did it. `machine.py` puts them into place.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PACKAGE = Path(__file__).parents[2] / "megatron_opd"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

_FACTORIES = set(
    "arange empty empty_strided eye full lift_fresh linspace ones rand randint randn scalar_tensor tril_indices "
    "zeros".split()
)
_WAITS = set(
    "_local_scalar_dense _unique2 bincount equal histc is_nonzero masked_select nonzero repeat_interleave "
    "unique_consecutive unique_dim".split()
)
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_NO_DATA = {"set_", "is_same_size", "_has_compatible_shallow_copy_type"}
# C++ makes tensors "like" one that it is given, whose device it reads past Python: these lines call such code.
_LIKE_IN_CPP = re.compile(r"pad_sequence|rms_norm|run_backward|\.backward\(|scaled_dot_product|type_as")
_TYPES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float64: "Double",
    torch.int64: "Long",
    torch.int32: "Int",
}


class Seen:
    """What the host waited for and what it copied, by kind and place ("module.py:line"), since the last `clear`."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()  # item(), tolist(), nonzero(), synchronize()
        self.copies_back: Counter[str] = Counter()  # to pageable memory: each waits, too
        self.pageable: Counter[str] = Counter()  # from pageable memory to the GPU
        self.pinned: Counter[str] = Counter()  # from or to pinned memory, without waiting

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def totals(self) -> dict[str, int]:
        return {kind: counter.total() for kind, counter in vars(self).items()}

    def places(self) -> dict[str, dict[str, int]]:
        return {kind: dict(counter.most_common()) for kind, counter in vars(self).items() if counter}


SEEN = Seen()
_pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no other tensor gets the address


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU; `inner` computes."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        # C++ sees a CPU tensor: autograd would ask a real device for its streams.
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner = inner
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 0

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return torch.Tensor.type(self, *args, **kwargs)
        return f"torch.cuda.{_TYPES.get(self.dtype, 'Other')}Tensor"

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(self, *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(self, CPU)

    @property
    def data(self) -> torch.Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        SEEN.waits[_place()] += 1
        return self.inner.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **kwargs: Any) -> str:
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to of a pretended tensor, or of a CPU tensor to the pretended GPU."""
    dtype, device, waits = kwargs.get("dtype"), kwargs.get("device"), not kwargs.get("non_blocking", False)
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            dtype, device = value.dtype, value.device
        elif _is_device(value):
            device = value
    device = tensor.device if device is None else GPU if on_gpu(device) else CPU
    if device == tensor.device and dtype in (None, tensor.dtype) and not kwargs.get("copy"):
        return tensor
    return aten._to_copy.default(tensor, dtype=dtype or tensor.dtype, device=device, non_blocking=not waits)


def on_gpu(device: Any) -> bool:
    """Whether what was given as a device is a GPU; None is not."""
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device | str | int) and not isinstance(value, bool)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in (what is taken for) pinned memory."""
    copy = tensor.clone()
    _pinned[copy.untyped_storage().data_ptr()] = copy
    return copy


def is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, Pretended) and tensor.untyped_storage().data_ptr() in _pinned


class Operators(TorchDispatchMode):
    """Sees every operator, those that make tensors among them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if on_gpu(kwargs.get("device")) or any(isinstance(t, Pretended) for t in tensors):
            return _run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            return pin(func(*args, **{**kwargs, "pin_memory": False}))
        out = func(*args, **kwargs)
        if not tensors and _name(func) in _FACTORIES and _LIKE_IN_CPP.search(_calling_line()):
            return _on_gpu(out)
        return out


class Functions(TorchFunctionMode):
    """What torch built for CPUs would refuse before operators see it: devices as numbers, new tensors on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = GPU
        if func is torch.Tensor.to and any(on_gpu(x) for x in (*args[1:], kwargs.get("device")) if _is_device(x)):
            return move(*args, **kwargs)
        if func not in (torch.tensor, torch.as_tensor):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        data = tree_map(lambda x: x.item() if isinstance(x, Pretended) else x, args[0])
        if isinstance(args[0], torch.Tensor):
            data = args[0]
            device = data.device if device is None else device
        made = func(data, *args[1:], **kwargs) if not isinstance(data, Pretended) else move(data, **kwargs)
        return move(made, GPU) if on_gpu(device) else made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator that has pretended tensors or makes some."""
    name, namespace = _name(func), func._schema.name.split("::")[0]
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    gpu = [t for t in tensors if isinstance(t, Pretended)]
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    asked = kwargs.get("device")
    if asked is not None:
        inner_kwargs["device"] = CPU
    inner_kwargs.pop("pin_memory", None)
    if name == "_to_copy":
        to_gpu = bool(gpu) if asked is None else on_gpu(asked)
        if gpu and not to_gpu and _LIKE_IN_CPP.search(_calling_line()):
            to_gpu = True
        if to_gpu != bool(gpu):
            _count_copy(tensors[0], None, to_gpu, kwargs.get("non_blocking", False))
        out = func(*inner_args, **inner_kwargs)
        return Pretended(out) if to_gpu else out
    if name == "copy_":
        target, source = args[:2]
        if isinstance(target, Pretended) != isinstance(source, Pretended) and source.dim():
            _count_copy(source, target, isinstance(target, Pretended), len(args) > 2 and args[2])
        func(*inner_args, **inner_kwargs)
        return target
    if name == "index_put" and not isinstance(args[0], Pretended) and isinstance(args[2], Pretended):
        return Pretended(func(*inner_args, **inner_kwargs))  # the gradient of indexing, from zeros that C++ made
    if namespace == "aten" and gpu and name not in _NO_DATA:
        _check_devices(name, args, tensors)
    if gpu:
        _count_wait(name, args)
    out = func(*inner_args, **inner_kwargs)
    if asked is not None and not on_gpu(asked) and not (gpu and _LIKE_IN_CPP.search(_calling_line())):
        return out
    if namespace != "aten":  # collectives return the tensors that they were given
        given = {id(t.inner): t for t in gpu}
        return tree_map(lambda t: given.get(id(t), t), out)
    given = _written(func, args, kwargs, out)
    return tree_map(_on_gpu, out) if given is None else given


def _written(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """What an operator that writes into its arguments returns: those arguments themselves."""
    schema = func._schema
    places = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not places or not schema.returns:
        return None
    given = [args[i] if i < len(args) else kwargs.get(schema.arguments[i].name) for i in places]
    if len(given) == 1 and isinstance(out, torch.Tensor):
        return given[0]
    return type(out)(given) if isinstance(out, tuple | list) and len(given) == len(out) else None


def _check_devices(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raises as torch does where devices meet; numbers (tensors without dimensions) may come from the CPU."""
    cpu = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if not cpu:
        return
    if name in _INDEXING and isinstance(args[0], Pretended):  # a GPU tensor takes indices from the CPU
        values = args[2] if len(args) > 2 else None
        if values is None or isinstance(values, Pretended) or not values.dim():
            for index in cpu:
                _count_copy(index, None, True, False)
            return
    kinds = [(str(t.device), tuple(t.shape)) for t in tensors]
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (aten.{name} "
        f"at {_place()}: {kinds})"
    )


def _count_copy(source: torch.Tensor, target: torch.Tensor | None, to_gpu: bool, non_blocking: bool) -> None:
    host = source if to_gpu else target
    if host is not None and is_pinned(host) and non_blocking:
        SEEN.pinned[_place()] += 1
    elif to_gpu:
        SEEN.pageable[_place()] += 1
    else:
        SEEN.copies_back[_place()] += 1


def _count_wait(name: str, args: Any) -> None:
    masked = name in _INDEXING and any(
        isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )
    if masked and len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], Pretended):
        masked = False  # `x[mask] = number` is masked_fill
    if masked or name in _WAITS:
        SEEN.waits[_place()] += 1


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _on_gpu(value: Any) -> Any:
    return Pretended(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretended) else value


def _frame(wanted: Callable[[str], bool]) -> Any:
    frame = sys._getframe(2)
    while frame and not wanted(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _place() -> str:
    """The innermost line of the package, with Megatron-Core's line where that is what it called."""
    ours = _frame(lambda name: name.startswith(str(PACKAGE)))
    if ours is None:
        return "outside the package"
    place = f"{Path(ours.f_code.co_filename).relative_to(PACKAGE)}:{ours.f_lineno}"
    called = _frame(lambda name: "/megatron/core/" in name or name == ours.f_code.co_filename)
    if called is not ours:
        name = called.f_code.co_filename.split("/megatron/core/")[-1]
        place += f" (Megatron-Core {name}:{called.f_lineno})"
    return place


def _calling_line() -> str:
    """The line of Python that called torch; that of autograd's backward where nothing did."""
    frame = _frame(lambda name: name != __file__ and ("/torch/" not in name or "/torch/nn/" in name))
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno) if frame else "run_backward"
