"""Writes a sharded model as a Hugging Face directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.parallel.collective import all_gather, is_rank_0
from megatron_opd.weights.bridge import ModelBridge
from megatron_opd.weights.converted import copy_side_files, whole_directory
from megatron_opd.weights.hf_files import DTYPES, SafetensorsWriter
from megatron_opd.weights.loading import export_hf_weights
from megatron_opd.weights.parameters import expert_on, hf_shapes, local_parameters, tensor_group

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def save_hf(
    chunks: list[torch.nn.Module],
    bridge: ModelBridge,
    groups: ProcessGroupCollection,
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
    tensors = planned_tensors(chunks, bridge, groups)
    if notes.get("tied_copy"):
        tensors[OUTPUT] = tensors[EMBEDDING]
    for name, dtype in notes.get("dtypes", {}).items():
        tensors[name] = (tensors[name][0], DTYPES[dtype])
    with whole_directory(out) as folder:
        writer, error = None, None
        if is_rank_0():
            try:
                copy_side_files(source, folder, bridge.config.params_dtype)
                plan = [(name, *tensors[name]) for name in sorted(tensors, key=_natural)]
                writer = SafetensorsWriter(folder, plan, max_shard_bytes)
            except OSError as caught:
                error = caught
        for name, tensor in export_hf_weights(chunks, bridge, groups, bucket_bytes, keep=is_rank_0()):
            if writer is None or error is not None:
                continue  # the other ranks are in the same collectives: go through with them, then report
            try:
                writer.write(name, tensor)
                if name == EMBEDDING and notes.get("tied_copy"):
                    writer.write(OUTPUT, tensor)
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


def planned_tensors(
    chunks: list[torch.nn.Module], bridge: ModelBridge, groups: ProcessGroupCollection
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that `export_hf_weights` will yield. Collective over the model's ranks."""
    mine = {}
    for parameter, _ in local_parameters(chunks, bridge, groups):
        if parameter.is_copy:
            continue
        shapes = hf_shapes(parameter, bridge, tensor_group(parameter, groups).size())
        for rank in range(groups.ep.size() if parameter.is_expert else 1):
            described = expert_on(parameter, rank, bridge, groups) if parameter.is_expert else parameter
            for name, shape in zip(bridge.hf_names(described.name), shapes, strict=True):
                mine[name] = (shape, parameter.dtype)
    return {name: planned for stage in all_gather(mine, groups.pp) for name, planned in stage.items()}


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sorts layer 10 behind layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]
