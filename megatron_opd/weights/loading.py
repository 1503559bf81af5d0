"""Parameters from a model directory into the shards of a layout, and from there as a stream of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.parallel.collective import all_gather, together
from megatron_opd.weights import converted
from megatron_opd.weights.bridge import ModelBridge
from megatron_opd.weights.hf_files import HFTensors, ModelFileError
from megatron_opd.weights.parameters import (
    COLUMNS,
    GATE_UP,
    VOCAB,
    WHOLE,
    Parameter,
    expert_on,
    fill,
    hf_shapes,
    local_parameters,
    model_names,
    tensor_group,
    values,
    writable,
)

_READ_BYTES = 16 << 20  # tensors are read in blocks of rows of about this size where no merging needs more


def load_model_weights(
    chunks: list[torch.nn.Module],
    directory: str | Path,
    bridge: ModelBridge,
    groups: ProcessGroupCollection,
    allow_pickle: bool = False,
) -> None:
    """Fills the chunks from a Hugging Face directory or from one made by `tools/convert.py import`.

    Collective over the world. Raises ModelFileError on every rank when one has a problem.
    """
    if converted.is_converted(directory):
        converted.load_converted(chunks, directory, bridge, groups)
    else:
        load_hf_weights(chunks, directory, bridge, groups, allow_pickle)


@torch.no_grad()
def load_hf_weights(
    chunks: list[torch.nn.Module],
    hf_dir: str | Path,
    bridge: ModelBridge,
    groups: ProcessGroupCollection,
    allow_pickle: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fills the chunks from safetensors, tensor by tensor; each rank reads the rows that it keeps, and nothing is sent.

    Values are converted to each parameter's dtype as they come; rows of the padded vocabulary become zeros. Besides the
    model itself about two of its matrices are held at a time. `progress` is called with the bytes of each parameter as
    it is filled. Collective over the world.

    Raises ModelFileError, naming file and tensor, on every rank: a missing or extra tensor (a tied output layer and
    rope buffers may be there), a wrong shape or dtype, a broken file.
    """
    parameters = local_parameters(chunks, bridge, groups)
    names = model_names((parameter for parameter, _ in parameters), bridge, groups)
    with together(), HFTensors(hf_dir, allow_pickle) as files:
        check_names(files, names, bridge)
        for parameter, tensor in parameters:
            target = writable(parameter, tensor)
            _load(parameter, target, files, bridge, groups)
            fill(tensor, target)
            if progress is not None:
                progress(parameter.local_bytes)


def check_names(files: HFTensors, names: set[str], bridge: ModelBridge) -> None:
    """Raises ModelFileError where a directory's tensors are not exactly those of the model."""
    found = {name for name in files.tensors if not name.endswith("rotary_emb.inv_freq")}  # a buffer, computed
    if bridge.tied:
        found.discard("lm_head.weight")  # a copy of the embedding; transformers ignores it too
    for problem, wrong in (("lacks", names - found), ("has extra", found - names)):
        if wrong:
            some = ", ".join(sorted(wrong)[:3]) + (", ..." if len(wrong) > 3 else "")
            where = files.directory
            if problem == "has extra":
                where = files.tensors[min(wrong)].file
            model = f"a {bridge.hf_config.model_type} of this config.json"
            raise ModelFileError(f"{where}: {problem} {len(wrong)} tensor(s) for {model}: {some}")


def _load(
    parameter: Parameter, tensor: Tensor, files: HFTensors, bridge: ModelBridge, groups: ProcessGroupCollection
) -> None:
    group = tensor_group(parameter, groups)
    size, rank = group.size(), group.rank()
    names = bridge.hf_names(parameter.name)
    shapes = hf_shapes(parameter, bridge, size)
    for name, shape in zip(names, shapes, strict=True):
        info = files.tensors[name]
        if info.shape != shape:
            raise ModelFileError(f"{info.file}: tensor {name} has shape {info.shape}, config.json asks for {shape}")
    if parameter.split == WHOLE:
        tensor.copy_(files.read(names[0]))
    elif parameter.split == VOCAB:
        first = rank * tensor.shape[0]
        count = max(0, min(tensor.shape[0], bridge.vocab_size - first))
        for start, stop in _blocks(count, tensor[:1].nbytes):
            tensor[start:stop].copy_(files.read(names[0], (first + start, first + stop)))
        tensor[count:].zero_()
    elif parameter.split == COLUMNS:
        rows, columns = tensor.shape
        for start, stop in _blocks(rows, tensor[:1].nbytes * size):
            block = files.read(names[0], (start, stop))
            tensor[start:stop].copy_(block[:, rank * columns : (rank + 1) * columns])
    else:
        slices = []
        for name, (rows, *_) in zip(names, shapes, strict=True):
            slices.append(files.read(name, (rank * rows // size, (rank + 1) * rows // size)).to(parameter.dtype))
        tensor.copy_(bridge.to_megatron(parameter.name, slices))


def _blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _READ_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@torch.no_grad()
def export_hf_weights(
    chunks: list[torch.nn.Module],
    bridge: ModelBridge,
    groups: ProcessGroupCollection,
    bucket_bytes: int = 512 << 20,
    keep: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Streams the whole model as (Hugging Face name, tensor), in the parameters' dtype, vocabulary padding removed.

    Collective over the model's ranks: each must exhaust the iterator. Shards are packed into buckets of at most
    `bucket_bytes` of gathered values (a single larger parameter makes a bucket of its own); the owning stage sends its
    shards to the other stages, then tensor and expert ranks exchange theirs: at most three collectives a bucket. Ranks
    with `keep=False` take part and yield nothing. A tied output layer appears once, as the embedding.

    A yielded tensor may share memory with the parameter or the bucket: use or copy it before asking for the next one.
    """
    mine = [(parameter, tensor) for parameter, tensor in local_parameters(chunks, bridge, groups)]
    mine = [(parameter, tensor) for parameter, tensor in mine if not parameter.is_copy]
    mine.sort(key=lambda item: _bucket_kind(item[0]))
    stages = all_gather([parameter for parameter, _ in mine], groups.pp)
    for stage, parameters in enumerate(stages):
        done = 0
        for bucket in _buckets(parameters, groups, bucket_bytes):
            tensors = [tensor for _, tensor in mine[done : done + len(bucket)]] if stage == groups.pp.rank() else []
            done += len(bucket)
            gathered = _gather(bucket, tensors, stage, groups, mine[0][1].device)
            if keep:
                yield from _unpack(bucket, gathered, bridge, groups)


def _bucket_kind(parameter: Parameter) -> tuple[bool, bool, str]:
    """Parameters of one kind go through the same collectives."""
    return parameter.is_expert, parameter.split == WHOLE, str(parameter.dtype)


def _buckets(parameters: list[Parameter], groups: ProcessGroupCollection, limit: int) -> Iterator[list[Parameter]]:
    for (is_expert, is_whole, _), kind in groupby(parameters, key=_bucket_kind):
        copies = 1 if is_whole else (groups.expt_tp if is_expert else groups.tp).size()
        copies *= groups.ep.size() if is_expert else 1
        bucket: list[Parameter] = []
        used = 0
        for parameter in kind:
            size = parameter.local_bytes * copies
            if bucket and used + size > limit:
                yield bucket
                bucket, used = [], 0
            bucket.append(parameter)
            used += size
        yield bucket


def _gather(
    bucket: list[Parameter], tensors: list[Tensor], stage: int, groups: ProcessGroupCollection, device: torch.device
) -> list[Tensor]:
    """Each parameter's shards as [expert ranks, tensor ranks, *shape]; `tensors` are given on the owning stage."""
    some = bucket[0]
    sizes = [torch.Size(parameter.shape).numel() for parameter in bucket]
    over = [] if some.split == WHOLE else [tensor_group(some, groups)]
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


def _unpack(
    bucket: list[Parameter], gathered: list[Tensor], bridge: ModelBridge, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    for parameter, shards in zip(bucket, gathered, strict=True):
        for expert_rank, tensor_shards in enumerate(shards):
            name = expert_on(parameter, expert_rank, bridge, groups).name if parameter.is_expert else parameter.name
            merged = merge_tensor_ranks(parameter.split, tensor_shards)
            if parameter.split == VOCAB:
                merged = merged[: bridge.vocab_size]
            yield from zip(bridge.hf_names(name), bridge.to_hf(name, merged), strict=True)


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
