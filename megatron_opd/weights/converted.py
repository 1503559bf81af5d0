"""The converted format: a model as a Megatron-Core distributed checkpoint that loads at any layout.

    config.json, tokenizer files, ...   as in the Hugging Face directory it came from
    megatron/                           the checkpoint (megatron.core.dist_checkpointing, backend torch_dist)
    megatron_opd.json                   the manifest, written last: a directory without it is incomplete

The checkpoint's entries are made from our own descriptions rather than by GPTModel.sharded_state_dict. That method asks
the global parallel state for ranks where embeddings are tied, which would be the student's ranks for a teacher; its
entries depend on the layer implementation and carry the padded vocabulary. Ours have one key per layer, Transformer
Engine's names and no padding.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_opd.compat.dist_checkpointing import (
    CheckpointException,
    Entries,
    agree_on_plan,
    file_name,
    first_failure,
    load,
    refused_pickle,
    save_planner,
    write_metadata,
    write_shards,
)
from megatron_opd.compat.gpt_model import EMBEDDING
from megatron_opd.errors import describe
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import all_gather, is_rank_0, on_rank_0, together
from megatron_opd.weights.hf_files import ModelFileError, side_files
from megatron_opd.weights.parameters import (
    COLUMNS,
    GATE_UP,
    VOCAB,
    WHOLE,
    Parameter,
    fill,
    local_parameters,
    tensor_group,
    values,
    writable,
)

MANIFEST = "megatron_opd.json"
CHECKPOINT = "megatron"
_FORMAT = 1
_BLOCK_BYTES = 32 << 20  # rows of the vocabulary are stored in blocks, which bounds what reading one holds in memory
# Transformer Engine's names of the norms that it fuses; the checkpoint has these for every implementation.
_FUSED = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)


def is_converted(directory: str | Path) -> bool:
    """Whether a directory was made by `tools/convert.py import`.

    Raises ModelFileError for one whose making was interrupted.
    """
    if Path(directory, MANIFEST).exists():
        return True
    if Path(directory, CHECKPOINT, "metadata.json").exists():
        raise ModelFileError(f"{directory}: {CHECKPOINT}/ without {MANIFEST}: an interrupted conversion; convert again")
    return False


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """What `save_converted` wrote. Raises ModelFileError: none there, unreadable, or of a newer format."""
    path = Path(directory, MANIFEST)
    if not path.exists():
        is_converted(directory)
        raise ModelFileError(f"{directory}: not a converted directory (no {MANIFEST}); make one with convert.py import")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path}: unreadable ({error!r}); convert again") from error
    if version != _FORMAT:
        raise ModelFileError(f"{path}: format {version}, this version reads {_FORMAT}; convert again")
    if problem := manifest_problem(manifest):
        raise ModelFileError(f"{path}: {problem}; convert again")
    return manifest


def manifest_problem(manifest: dict[str, Any]) -> str:
    """What a manifest says wrongly of its model; empty where it is one of ours."""
    if not isinstance(manifest.get("model_type"), str):
        return f"model_type: {manifest.get('model_type')!r} names no model"
    dtype = manifest.get("dtype")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        return f"dtype: {dtype!r} is none"
    return ""


def save_converted(model: Model, source: str | Path, out: str | Path, notes: dict[str, Any] | None = None) -> None:
    """Writes the model in the converted format, whole or not at all; `notes` go into the manifest.

    `source` gives config.json, tokenizer and the like. Tensors are written one by one, so little memory is needed
    beside the model. Collective over the world, which must share the file system. Raises ModelFileError if `out` is in
    use or cannot be written.
    """
    with whole_directory(out) as folder:
        entries = sharded_entries(local_parameters(model), model, loading=False)
        on_rank_0((folder / CHECKPOINT).mkdir)  # nobody writes before the folder is there
        planner = save_planner(entries, is_rank_0())
        plan, metadata = agree_on_plan(planner)
        items = ((item, planner.resolve_data(item)) for item in plan.items)
        with together():
            results = write_shards(folder / CHECKPOINT, file_name(dist.get_rank()), items) if plan.items else []
        shards = all_gather(results)
        if metadata is not None:  # on rank 0
            write_metadata(folder / CHECKPOINT, metadata, shards)
        if is_rank_0():
            copy_side_files(source, folder, model.config.params_dtype)
            manifest = manifest_of(model) | (notes or {})
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def manifest_of(model: Model) -> dict[str, Any]:
    """What every manifest says of its model."""
    return {
        "format": _FORMAT,
        "model_type": model.bridge.hf_config.model_type,
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
        "written_by": {"tensor": model.groups.tp.size(), "pipeline": model.groups.pp.size()},
    }


@torch.no_grad()
def load_converted(model: Model, directory: str | Path) -> None:
    """Fills the model, at any layout and in any dtype, from a converted directory. Collective over the world.

    Raises ModelFileError on every rank: not converted, of another architecture, missing or broken files.
    """
    with together():
        manifest, family = read_manifest(directory), model.bridge.hf_config.model_type
        if manifest["model_type"] != family:
            raise ModelFileError(f"{directory}: {MANIFEST} says {manifest['model_type']}, config.json {family}")
    parameters = local_parameters(model)
    targets = [(p, writable(p, t)) for p, t in parameters]
    checkpoint_dir = Path(directory, CHECKPOINT)
    with together():
        entries = sharded_entries(targets, model, loading=True)
        try:
            load(entries, checkpoint_dir)
        except (Exception, CheckpointException) as error:  # many kinds, from Megatron-Core, torch and pickle
            raise ModelFileError(f"{checkpoint_dir}: cannot be loaded: {root_cause(error)}") from error
    for (parameter, tensor), (_, target) in zip(parameters, targets, strict=True):
        if parameter.split == VOCAB:
            first = model.groups.tp.rank() * tensor.shape[0]
            target[max(0, model.bridge.vocab_size - first) :].zero_()
        fill(tensor, target)


def root_cause(error: BaseException) -> str:
    """The first failure that torch's checkpoint code collected from the ranks: one line, without its tracebacks."""
    error = first_failure(error)
    return (
        describe(error) if isinstance(error, OSError) else next(iter(refused_pickle(error).splitlines()), repr(error))
    )


def sharded_entries(parameters: list[tuple[Parameter, Tensor]], model: Model, loading: bool) -> Entries:
    """Local tensors, shared between ranks as their parameters say, as pieces of whole ones without padding."""
    entries: Entries = {}
    for parameter, tensor in parameters:
        if parameter.is_copy and not loading:
            continue
        key = checkpoint_key(parameter, model)
        group = tensor_group(parameter, model)
        replica = (model.groups.expt_dp if parameter.is_expert else model.groups.dp_cp).rank()
        data = tensor if loading else values(tensor)
        for i, (part, offsets, whole) in enumerate(shard_parts(parameter, data, model)):
            entries[f"{parameter.name}/{i}"] = ShardedTensor(
                key=key,
                data=part,
                dtype=part.dtype,
                local_shape=tuple(part.shape),
                global_shape=whole,
                global_offset=offsets,
                axis_fragmentations=None,  # parts differ in size: the last rows of the vocabulary
                replica_id=(0, group.rank() if parameter.split == WHOLE else 0, replica),
            )
    return entries


def checkpoint_key(parameter: Parameter, model: Model) -> str:
    """A parameter's key in the checkpoint, the same for every layer implementation."""
    key = EMBEDDING if parameter.is_copy else parameter.name
    for local, fused in _FUSED:
        if not model.config.num_moe_experts or local.startswith(".input"):  # a router follows the other norm
            key = key.replace(local, fused)
    return key


def shard_parts(
    parameter: Parameter, tensor: Tensor, model: Model
) -> Iterator[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Pieces of a local shard `tensor`, each with its offset in the whole parameter and that one's shape."""
    group = tensor_group(parameter, model)
    rank, size = group.rank(), group.size()
    rows, *rest = tensor.shape
    zeros = (0,) * len(rest)
    if parameter.split == WHOLE:
        yield tensor, (0, *zeros), tuple(tensor.shape)
    elif parameter.split == COLUMNS:
        yield tensor, (0, rank * rest[0]), (rows, size * rest[0])
    elif parameter.split == GATE_UP:
        half = rows // 2
        for i in range(2):
            yield tensor[i * half : (i + 1) * half], ((i * size + rank) * half, *zeros), (rows * size, *rest)
    elif parameter.split == VOCAB:
        first = rank * rows
        step = max(1, _BLOCK_BYTES // tensor[:1].nbytes)
        count = max(0, min(rows, model.bridge.vocab_size - first))
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield tensor[start:stop], (first + start, *zeros), (model.bridge.vocab_size, *rest)
    else:
        yield tensor, (rank * rows, *zeros), (rows * size, *rest)


@contextmanager
def whole_directory(out: str | Path) -> Iterator[Path]:
    """A directory beside `out` to write into, renamed to `out` when the block ends and removed when it fails.

    Collective over the world: every rank gets the same path, and an error on one of them ends the block for all. Raises
    ModelFileError where `out` exists and is not an empty directory, or cannot be made.
    """
    out = Path(out).absolute()

    def make() -> Path:
        check_free(out)
        folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise ModelFileError(f"{out}: cannot be written: {describe(error)}") from error
        return folder

    folder = on_rank_0(make)
    try:
        with together():
            try:
                yield folder
            except OSError as error:
                raise ModelFileError(f"{out}: cannot be written: {describe(error)}") from error
        if is_rank_0():
            folder.rename(out)
    except BaseException:
        if is_rank_0():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(out: str | Path) -> None:
    """Raises ModelFileError unless `out` does not exist or is an empty directory."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelFileError(f"{out}: already in use; give a new or an empty directory")


def copy_side_files(source: str | Path, target: str | Path, dtype: torch.dtype) -> None:
    """Configuration, tokenizer, chat template, generation settings and model card; config.json names `dtype`."""
    for path in side_files(source):
        if path.is_dir():
            shutil.copytree(path, Path(target, path.name))
        elif path.name != MANIFEST:
            shutil.copy2(path, Path(target, path.name))
    path = Path(target, "config.json")
    config, name = json.loads(path.read_text()), str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key, name) != name:
        path.write_text(json.dumps({**config, key: name}, indent=2) + "\n")
