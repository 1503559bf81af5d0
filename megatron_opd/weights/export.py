"""A sharded model as a stream of Hugging Face tensors, for engines, and as a Hugging Face directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import all_gather, is_rank_0
from megatron_opd.weights.converted import copy_side_files, whole_directory
from megatron_opd.weights.hf_files import DTYPES, EMBEDDING, HEAD, SafetensorsWriter
from megatron_opd.weights.parameters import (
    COLUMNS,
    GATE_UP,
    VOCAB,
    WHOLE,
    Parameter,
    hf_shapes,
    local_parameters,
    on_expert_ranks,
    tensor_group,
    values,
)


@torch.no_grad()
def export_parameters(model: Model, bucket_bytes: int = 512 << 20, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Streams the whole model as (Hugging Face name, tensor), in the parameters' dtype, vocabulary padding removed.

    Collective over the model's ranks: each must exhaust the iterator. Shards are packed into buckets of at most
    `bucket_bytes` of gathered values (a single larger parameter makes a bucket of its own); the owning stage sends its
    shards to the other stages, then tensor and expert ranks exchange theirs: at most three collectives a bucket. Ranks
    with `keep=False` take part and yield nothing. A tied output layer appears once, as the embedding.

    A yielded tensor may share memory with the parameter or the bucket: use or copy it before asking for the next one.
    """
    mine = [(parameter, tensor) for parameter, tensor in local_parameters(model) if not parameter.is_copy]
    mine.sort(key=lambda item: _bucket_kind(item[0]))
    pp = model.groups.pp
    for stage, parameters in enumerate(all_gather([parameter for parameter, _ in mine], pp)):
        done = 0
        for bucket in _buckets(parameters, model, bucket_bytes):
            tensors = [tensor for _, tensor in mine[done : done + len(bucket)]] if stage == pp.rank() else []
            done += len(bucket)
            gathered = _gather(bucket, tensors, stage, model)
            if keep:
                yield from _unpack(bucket, gathered, model)


def _bucket_kind(parameter: Parameter) -> tuple[bool, bool, str]:
    """Parameters of one kind go through the same collectives."""
    return parameter.is_expert, parameter.split == WHOLE, str(parameter.dtype)


def _buckets(parameters: list[Parameter], model: Model, limit: int) -> Iterator[list[Parameter]]:
    for (is_expert, is_whole, _), kind in groupby(parameters, key=_bucket_kind):
        members = list(kind)
        copies = 1 if is_whole else tensor_group(members[0], model).size()
        copies *= model.groups.ep.size() if is_expert else 1
        bucket: list[Parameter] = []
        used = 0
        for parameter in members:
            size = parameter.local_bytes * copies
            if bucket and used + size > limit:
                yield bucket
                bucket, used = [], 0
            bucket.append(parameter)
            used += size
        yield bucket


def _gather(bucket: list[Parameter], tensors: list[Tensor], stage: int, model: Model) -> list[Tensor]:
    """Each parameter's shards as [expert ranks, tensor ranks, *shape]; `tensors` are given on the owning stage."""
    some, groups = bucket[0], model.groups
    device = next(model.chunks[0].parameters()).device  # of the parameters: with teacher.offload not the model's
    sizes = [torch.Size(parameter.shape).numel() for parameter in bucket]
    over = [] if some.split == WHOLE else [tensor_group(some, model)]
    over += [groups.ep] if some.is_expert else []
    if groups.pp.size() == 1 and all(group.size() == 1 for group in over):
        return [values(tensor)[None, None] for tensor in tensors]
    if tensors:
        flat = torch.cat([values(tensor).reshape(-1) for tensor in tensors])
    else:
        flat = torch.empty(sum(sizes), dtype=some.dtype, device=device)
    raw = flat.view(torch.uint8)  # bytes travel unchanged through every backend
    if groups.pp.size() > 1:
        dist.broadcast(raw, dist.get_global_rank(groups.pp, stage), group=groups.pp)
    for group in over:
        if group.size() > 1:
            joined = torch.empty(group.size() * raw.numel(), dtype=torch.uint8, device=raw.device)
            dist.all_gather_into_tensor(joined, raw, group=group)
            raw = joined
    expert_ranks = groups.ep.size() if some.is_expert else 1
    shards = raw.view(some.dtype).view(expert_ranks, -1, sum(sizes)).split(sizes, dim=2)
    return [shard.unflatten(2, parameter.shape) for shard, parameter in zip(shards, bucket, strict=True)]


def _unpack(bucket: list[Parameter], gathered: list[Tensor], model: Model) -> Iterator[tuple[str, Tensor]]:
    bridge = model.bridge
    for parameter, shards in zip(bucket, gathered, strict=True):
        for described, tensor_shards in zip(on_expert_ranks(parameter, model), shards, strict=True):
            merged = merge_tensor_ranks(parameter.split, tensor_shards)
            if parameter.split == VOCAB:
                merged = merged[: bridge.vocab_size]
            yield from zip(bridge.hf_names(described.name), bridge.to_hf(described.name, merged), strict=True)


def merge_tensor_ranks(split: str, shards: Tensor) -> Tensor:
    """Shards [tensor ranks, *shard] of one parameter -> the parameter as one tensor rank alone would hold it."""
    ranks = shards.shape[0]
    if split == WHOLE or ranks == 1:
        return shards[0]
    if split == COLUMNS:
        return shards.transpose(0, 1).flatten(1)
    if split == GATE_UP:
        return shards.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    return shards.flatten(0, 1)


def save_hf(
    model: Model,
    source: str | Path,
    out: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    notes: dict[str, Any] | None = None,
    bucket_bytes: int = 64 << 20,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes `out`: safetensors with an index, and the configuration, tokenizer and so on of `source`.

    Whole or not at all, and streaming: rank 0 holds one bucket beside its shard. `notes` are a converted directory's
    manifest: `dtypes` names tensors that had another dtype than the rest, `tied_copy` that a tied output layer was
    stored as well. `progress` is called with the bytes of each tensor written. Collective over the world, which must
    share the file system. Raises ModelFileError if `out` is in use or cannot be written.
    """
    notes = notes or {}
    tensors = planned_tensors(model)
    if notes.get("tied_copy"):
        tensors[HEAD] = tensors[EMBEDDING]
    for name, dtype in notes.get("dtypes", {}).items():
        tensors[name] = (tensors[name][0], DTYPES[dtype])
    with whole_directory(out) as folder:
        writer, error = None, None
        if is_rank_0():
            try:
                copy_side_files(source, folder, model.config.params_dtype)
                plan = [(name, *tensors[name]) for name in sorted(tensors, key=_natural)]
                writer = SafetensorsWriter(folder, plan, max_shard_bytes)
            except OSError as caught:
                error = caught
        for name, tensor in export_parameters(model, bucket_bytes, keep=is_rank_0()):
            if writer is None or error is not None:
                continue  # the other ranks are in the same collectives: go through with them, then report
            try:
                writer.write(name, tensor)
                if name == EMBEDDING and notes.get("tied_copy"):
                    writer.write(HEAD, tensor)
            except OSError as caught:
                error = caught
            if progress is not None:
                progress(tensor.nbytes)
        if writer is not None and error is None:
            writer.finish()
        elif writer is not None:
            writer.close()
        if error is not None:
            raise error


def planned_tensors(model: Model) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that `export_parameters` will yield. Collective over the model's ranks."""
    mine = {}
    for parameter, _ in local_parameters(model):
        if parameter.is_copy:
            continue
        shapes = hf_shapes(parameter, model)
        for described in on_expert_ranks(parameter, model):
            for name, shape in zip(model.bridge.hf_names(described.name), shapes, strict=True):
                mine[name] = (shape, parameter.dtype)
    return {name: planned for stage in all_gather(mine, model.groups.pp) for name, planned in stage.items()}


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sorts layer 10 behind layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]
