"""How each parameter of a Megatron-Core model lies between ranks, and what it is called in Hugging Face format.

Loading, export and the converted format all work on these descriptions. Nothing here touches Megatron-Core's global
parallel state: layer numbers come from the layers themselves, ranks from the given process groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.parallel.collective import all_gather
from megatron_opd.weights.bridge import ModelBridge
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


def local_parameters(
    chunks: Iterable[torch.nn.Module], bridge: ModelBridge, groups: ProcessGroupCollection
) -> list[tuple[Parameter, Tensor]]:
    """This rank's parameters of all (virtual pipeline) chunks, in the order of the model."""
    found = []
    for chunk in chunks:
        while hasattr(chunk, "module"):  # DDP and mixed-precision wrappers
            chunk = chunk.module  # type: ignore[assignment]
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]  # type: ignore[union-attr]
        for local_name, tensor in chunk.named_parameters():
            name = _global_name(local_name, numbers, bridge, groups)
            is_copy = bridge.tied and name == "output_layer.weight"
            dtype = torch.bfloat16 if is_float8tensor(tensor) else tensor.dtype
            is_expert = ".mlp.experts." in name
            parameter = Parameter(name, _split(name), tuple(tensor.shape), dtype, is_expert, is_copy)
            # Detached, an FP8 parameter would be another object with caches of its own.
            found.append((parameter, tensor if is_float8tensor(tensor) else tensor.detach()))
    return found


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
    keeps = getattr(tensor, "get_high_precision_init_val", None)
    initial = keeps() if keeps is not None else None
    if initial is not None:
        initial.copy_(source)


def tensor_group(parameter: Parameter, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that share this parameter by tensor parallelism."""
    return groups.expt_tp if parameter.is_expert else groups.tp


def hf_shapes(parameter: Parameter, bridge: ModelBridge, tensor_size: int) -> list[tuple[int, ...]]:
    """Shapes of the whole Hugging Face tensors, in the order of `bridge.hf_names`."""
    rows, *rest = parameter.shape
    if parameter.split == WHOLE:
        return [parameter.shape]
    if parameter.split == VOCAB:
        return [(bridge.vocab_size, *rest)]
    if parameter.split == COLUMNS:
        return [(rows, rest[0] * tensor_size)]
    if parameter.split == GATE_UP:
        return [(rows // 2 * tensor_size, *rest)] * 2
    config = bridge.hf_config
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [(count * config.head_dim, *rest) for count in counts]


def expert_on(parameter: Parameter, rank: int, bridge: ModelBridge, groups: ProcessGroupCollection) -> Parameter:
    """The description of the parameter that expert-parallel rank `rank` holds in this one's place."""
    if not parameter.is_expert or rank == groups.ep.rank():
        return parameter
    per_rank = bridge.config.num_moe_experts // groups.ep.size()
    prefix, number = re.fullmatch(r"(.*\.weight)(\d+)", parameter.name).groups()  # type: ignore[union-attr]
    return replace(parameter, name=f"{prefix}{int(number) + (rank - groups.ep.rank()) * per_rank}")


def model_names(parameters: Iterable[Parameter], bridge: ModelBridge, groups: ProcessGroupCollection) -> set[str]:
    """Hugging Face names of the whole model: all stages, all experts. Collective."""
    names: set[str] = set()
    for parameter in parameters:
        for rank in range(groups.ep.size() if parameter.is_expert else 1):
            described = expert_on(parameter, rank, bridge, groups) if parameter.is_expert else parameter
            names.update(bridge.hf_names(described.name))
    return set().union(*all_gather(names, groups.pp))


def _global_name(local_name: str, numbers: list[int], bridge: ModelBridge, groups: ProcessGroupCollection) -> str:
    layer = re.match(r"decoder\.layers\.(\d+)\.", local_name)
    if layer is None:
        return local_name
    name = f"decoder.layers.{numbers[int(layer[1])]}.{local_name[layer.end() :]}"
    # Experts one by one are Megatron-Core's `local_experts.3.linear_fc1.weight`, grouped ones `linear_fc1.weight3`.
    name = re.sub(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r".experts.\2.weight\1", name)
    expert = re.fullmatch(r"(.*\.mlp\.experts\.linear_fc\d\.weight)(\d+)", name)
    if expert is None:
        return name
    per_rank = bridge.config.num_moe_experts // groups.ep.size()
    return f"{expert[1]}{int(expert[2]) + groups.ep.rank() * per_rank}"


def _split(name: str) -> str:
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return VOCAB
    if re.search(r"linear_qkv\.(weight|bias)$", name):
        return QKV
    if re.search(r"linear_fc1\.weight\d*$", name):
        return GATE_UP
    if re.search(r"(linear_proj\.weight|linear_fc2\.weight\d*)$", name):
        return COLUMNS
    if name == "decoder.final_layernorm.weight" or re.search(r"(norm|router|layer_norm_weight)(\.weight)?$", name):
        return WHOLE
    raise ModelFileError(f"parameter {name}: no rule for how tensor ranks share it (weights/parameters.py)")
