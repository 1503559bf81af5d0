"""What a checkpoint stores of the student, as pieces of whole tensors that any layout can put together again.

The parameters are those of the converted format (`weights/converted.py`). The optimizer's tensors (Adam's two moments,
and the fp32 copy of a bf16 parameter) lie as their parameters do and are described in the same way, under keys such as
`exp_avg/decoder.layers.0...`. A distributed optimizer holds a flat range of each local parameter; that range is cut
into rectangles, so its checkpoints load at every layout too, with or without a distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_opd.compat.dist_checkpointing import Entries
from megatron_opd.compat.megatron import base_optimizers, is_distributed, updated_tensor
from megatron_opd.models.model import Model
from megatron_opd.weights.converted import checkpoint_key, shard_parts, sharded_entries
from megatron_opd.weights.parameters import WHOLE, Parameter, local_parameters, tensor_group

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"  # the fp32 copy of a parameter of lower precision


def parameter_entries(student: Model) -> Entries:
    """The student's parameters, for saving."""
    return _spread(sharded_entries(local_parameters(student), student, loading=False), student)


def optimizer_entries(student: Model, optimizer: MegatronOptimizer, loading: bool) -> Entries:
    """The optimizer's tensors; when loading, those to fill. They are made where the optimizer has not run yet."""
    described = local_parameters(student)
    trained = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
    optimizers = base_optimizers(optimizer)
    for one in optimizers:
        _make_state(one.optimizer)
    shaped: dict[str, list[tuple[Parameter, Tensor]]] = {}
    flat: Entries = {}
    for (parameter, _), tensor in zip(described, trained, strict=True):
        slot = _find_slot(optimizers, tensor)
        for kind, state in slot.tensors.items():
            if slot.start is None:
                shaped.setdefault(kind, []).append((replace(parameter, dtype=state.dtype), state))
            elif loading or not parameter.is_copy:
                flat |= _flat_entries(kind, parameter, state, slot.start, student)
    entries: Entries = {}
    for kind, parameters in shaped.items():
        sharded = sharded_entries(parameters, student, loading)
        entries |= {f"{kind}/{name}": replace(entry, key=f"{kind}/{entry.key}") for name, entry in sharded.items()}
    return flat | (entries if loading else _spread(entries, student))


def get_adam_step(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam has made; it corrects its moments' bias by this number."""
    for one in base_optimizers(optimizer):
        for group in one.optimizer.param_groups:
            if group.get("step"):
                return int(group["step"])  # Transformer Engine and Apex count per group, torch per parameter
            for parameter in group["params"]:
                if "step" in one.optimizer.state.get(parameter, {}):
                    return int(one.optimizer.state[parameter]["step"])
    return 0


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    for one in base_optimizers(optimizer):
        counts_per_parameter = isinstance(one.optimizer, torch.optim.Adam)
        for group in one.optimizer.param_groups:
            if not counts_per_parameter:
                group["step"] = step
                continue
            for parameter in group["params"]:
                if parameter.numel():
                    one.optimizer.state[parameter]["step"].fill_(step)


@dataclass
class _Slot:
    """The optimizer's tensors of one local parameter."""

    tensors: dict[str, Tensor]  # by kind; of the parameter's shape, or flat
    start: int | None  # where the flat range starts in the local parameter; None: they have its shape


def _find_slot(optimizers: list[MegatronOptimizer], parameter: Tensor) -> _Slot:
    for optimizer in optimizers:
        updated = updated_tensor(optimizer, parameter)
        if updated is None:
            continue
        if updated.tensor.numel() == 0:
            return _Slot({}, updated.start)
        if updated.tensor in optimizer.optimizer.state:
            tensors = {kind: optimizer.optimizer.state[updated.tensor][kind] for kind in MOMENTS}
            if parameter.dtype != torch.float32:
                tensors[MAIN] = updated.tensor.detach()
            return _Slot(tensors, updated.start)
    if any(is_distributed(optimizer) for optimizer in optimizers):
        return _Slot({}, 0)  # another data-parallel rank holds all of it
    raise RuntimeError(f"no optimizer holds the parameter of shape {tuple(parameter.shape)}")


def _make_state(adam: torch.optim.Optimizer) -> None:
    """Adam's state as it is before the first update."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if parameter.numel() == 0 or adam.state.get(parameter):
                continue
            adam.state[parameter] = {kind: torch.zeros_like(parameter, dtype=torch.float32) for kind in MOMENTS}
            if isinstance(adam, torch.optim.Adam):
                adam.state[parameter]["step"] = torch.tensor(0.0)


def _flat_entries(kind: str, parameter: Parameter, flat: Tensor, start: int, student: Model) -> Entries:
    """A flat range of a local parameter as rectangles of the whole one."""
    entries: Entries = {}
    group = tensor_group(parameter, student)
    stop = start + flat.numel()
    outline = torch.empty(parameter.shape, dtype=flat.dtype, device="meta")
    key = f"{kind}/{checkpoint_key(parameter, student)}"
    for part, offsets, whole in shard_parts(parameter, outline, student):
        first = int(part.storage_offset())  # each part is a run of whole rows
        low, high = max(start, first), min(stop, first + part.numel())
        for row, column, shape in _rectangles(low - first, high - first, part.shape):
            begin = first + row * (part[0].numel() if part.dim() > 1 else 1) + column - start
            data = flat[begin : begin + torch.Size(shape).numel()].view(shape)
            offset = (offsets[0] + row, *((offsets[1] + column,) if part.dim() > 1 else ()))
            entries[f"{kind}/{parameter.name}/{offset}"] = ShardedTensor(
                key=key,
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_shape=whole,
                global_offset=offset,
                axis_fragmentations=None,
                # Each data-parallel rank holds a range of its own.
                replica_id=(0, group.rank() if parameter.split == WHOLE else 0, 0),
            )
    return entries


def _rectangles(low: int, high: int, shape: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Elements low..high of a row-major [rows, width] (or [rows]) as (row, column, shape) of at most three blocks."""
    if high <= low:
        return
    if len(shape) == 1:
        yield low, 0, (high - low,)
        return
    width = shape[1]
    if low % width:
        count = min(width - low % width, high - low)
        yield low // width, low % width, (1, count)
        low += count
    rows = (high - low) // width
    if rows > 0:
        yield low // width, 0, (rows, width)
        low += rows * width
    if high > low:
        yield low // width, 0, (1, high - low)


def _spread(entries: Entries, student: Model) -> Entries:
    """Lets data-parallel replicas take turns in writing what all of them hold."""
    spread = {}
    for turn, (name, entry) in enumerate(entries.items()):
        size = (student.groups.expt_dp if ".mlp.experts." in entry.key else student.groups.dp_cp).size()
        *others, replica = entry.replica_id  # type: ignore[misc]
        spread[name] = replace(entry, replica_id=(*others, (replica - turn) % size))
    return spread
