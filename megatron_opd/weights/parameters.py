"""How each parameter of a Megatron-Core model lies between ranks, and what it is called in Hugging Face format.

Loading, export and the converted format all work on these descriptions. Nothing here touches Megatron-Core's global
parallel state: layer numbers come from the layers themselves, ranks from the given process groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_opd.compat.gpt_model import EMBEDDING, FINAL_NORM, HEAD, layer_numbers
from megatron_opd.compat.transformer_engine import initial_values
from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import all_gather
from megatron_opd.weights.hf_files import ModelFileError

# How tensor ranks share a parameter.
WHOLE = "whole"  # every rank holds all of it
VOCAB = "vocab"  # rows of the padded vocabulary
QKV = "qkv"  # whole key/value groups, each with its queries, key and value
GATE_UP = "gate_up"  # a share of the gate's rows above the same share of the up projection's
COLUMNS = "columns"  # columns


@dataclass(frozen=True)
class Parameter:
    """One parameter's description; without its tensor it can travel to other ranks."""

    name: str  # with global layer and expert numbers, fused norms under Transformer Engine's names
    split: str
    shape: tuple[int, ...]  # of the local shard
    dtype: torch.dtype  # of its values: bf16 for an FP8 parameter
    is_expert: bool
    is_copy: bool  # the last stage's copy of a tied embedding

    @property
    def local_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def local_parameters(model: Model) -> list[tuple[Parameter, Tensor]]:
    """This rank's parameters of all (virtual pipeline) chunks, in the order of the model."""
    described = []
    for chunk in model.chunks:
        numbers = layer_numbers(chunk)
        for local_name, tensor in chunk.named_parameters():
            name = _global_name(local_name, numbers, model)
            is_copy = model.bridge.tied and name == HEAD
            dtype = torch.bfloat16 if is_float8tensor(tensor) else tensor.dtype
            is_expert = ".mlp.experts." in name
            parameter = Parameter(name, _split(name), tuple(tensor.shape), dtype, is_expert, is_copy)
            # Detached, an FP8 parameter would be another object with caches of its own.
            described.append((parameter, tensor if is_float8tensor(tensor) else tensor.detach()))
    return described


def values(tensor: Tensor) -> Tensor:
    """A parameter's values: itself, or bf16 values of an FP8 one."""
    return dequantize_fp8_tensor(tensor).detach() if is_float8tensor(tensor) else tensor


def writable(parameter: Parameter, tensor: Tensor) -> Tensor:
    """What can be filled piece by piece for a parameter: itself, or a plain tensor that `fill` then takes."""
    return torch.empty(parameter.shape, dtype=parameter.dtype) if is_float8tensor(tensor) else tensor


def fill(tensor: Tensor, source: Tensor) -> None:
    """Gives an FP8 parameter its values: all at once, since they share scales. Nothing to do for `source` itself.

    Where the parameter still keeps the values that it was made from, for the optimizer's fp32 copy, those are filled,
    too: that copy starts from the exact values."""
    if source is tensor:
        return
    tensor.copy_(source)
    initial = initial_values(tensor)
    if initial is not None:
        initial.copy_(source)


def tensor_group(parameter: Parameter, model: Model) -> dist.ProcessGroup:
    """The ranks that share this parameter by tensor parallelism."""
    return model.groups.expt_tp if parameter.is_expert else model.groups.tp


def hf_shapes(parameter: Parameter, model: Model) -> list[tuple[int, ...]]:
    """Shapes of the whole Hugging Face tensors, in the order of `bridge.hf_names`."""
    rows, *rest = parameter.shape
    size = tensor_group(parameter, model).size()
    if parameter.split == WHOLE:
        return [parameter.shape]
    if parameter.split == VOCAB:
        return [(model.bridge.vocab_size, *rest)]
    if parameter.split == COLUMNS:
        return [(rows, rest[0] * size)]
    if parameter.split == GATE_UP:
        return [(rows // 2 * size, *rest)] * 2
    config = model.bridge.hf_config
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [(count * config.head_dim, *rest) for count in counts]


def on_expert_ranks(parameter: Parameter, model: Model) -> list[Parameter]:
    """What each expert-parallel rank holds in this parameter's place; the parameter alone where it is no expert's."""
    if not parameter.is_expert:
        return [parameter]
    own, size = model.groups.ep.rank(), model.groups.ep.size()
    per_rank = _experts_per_rank(model)
    prefix, number = re.fullmatch(r"(.*\.weight)(\d+)", parameter.name).groups()  # type: ignore[union-attr]
    return [replace(parameter, name=f"{prefix}{int(number) + (rank - own) * per_rank}") for rank in range(size)]


def hf_names(model: Model) -> set[str]:
    """Hugging Face names of the whole model: all stages, all experts. Collective over the model's ranks."""
    names: set[str] = set()
    for parameter, _ in local_parameters(model):
        for described in on_expert_ranks(parameter, model):
            names.update(model.bridge.hf_names(described.name))
    return set().union(*all_gather(names, model.groups.pp))


def _experts_per_rank(model: Model) -> int:
    return model.bridge.config.num_moe_experts // model.groups.ep.size()  # type: ignore[operator]


def _global_name(local_name: str, numbers: list[int], model: Model) -> str:
    layer = re.match(r"decoder\.layers\.(\d+)\.", local_name)
    if layer is None:
        return local_name
    name = f"decoder.layers.{numbers[int(layer[1])]}.{local_name[layer.end() :]}"
    # Experts one by one are Megatron-Core's `local_experts.3.linear_fc1.weight`, grouped ones `linear_fc1.weight3`.
    name = re.sub(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r".experts.\2.weight\1", name)
    expert = re.fullmatch(r"(.*\.mlp\.experts\.linear_fc\d\.weight)(\d+)", name)
    if expert is None:
        return name
    return f"{expert[1]}{int(expert[2]) + model.groups.ep.rank() * _experts_per_rank(model)}"


def _split(name: str) -> str:
    if name in (EMBEDDING, HEAD):
        return VOCAB
    if re.search(r"linear_qkv\.(weight|bias)$", name):
        return QKV
    if re.search(r"linear_fc1\.weight\d*$", name):
        return GATE_UP
    if re.search(r"(linear_proj\.weight|linear_fc2\.weight\d*)$", name):
        return COLUMNS
    if name == FINAL_NORM or re.search(r"(norm|router|layer_norm_weight)(\.weight)?$", name):
        return WHOLE
    raise ModelFileError(f"parameter {name}: no rule for how tensor ranks share it (weights/parameters.py)")
