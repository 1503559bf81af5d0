"""The Hugging Face architectures that can be trained, and what one of your own needs (config: student.family)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from megatron_opd.config import ConfigError
from megatron_opd.plugins import load_part


def _no_fields(_hf_config: PretrainedConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How an architecture of Hugging Face is configured and named in Megatron-Core.

    It must be a decoder with RMSNorm before attention and MLP, rotary positions and a gated MLP, whose config.json has
    the usual keys (num_attention_heads, num_key_value_heads, intermediate_size, ...) and that transformers knows.
    """

    like: str
    """The built-in family whose parameter names and settings it has, but for what follows: llama (no biases), qwen2
    (biases of q, k and v), qwen3 (norms of q and k) or qwen3_moe (mixture of experts)."""
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Hugging Face names of a parameter's tensors where they differ, by Megatron-Core's name: of a layer's parameter
    without `decoder.layers.N.`, with {layer_number} in the tensors' names. q, k and v make up
    `self_attention.linear_qkv.weight`, gate and up `mlp.linear_fc1.weight`, in this order."""
    fields: Callable[[PretrainedConfig], dict[str, Any]] = _no_fields
    """Fields of Megatron-Core's TransformerConfig that follow from the model's configuration."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json with the one value that is supported: what would be computed wrongly is refused. They win
    over what holds for the built-in families (hidden_act: silu, attention_bias: false, ...)."""


FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family(
        "qwen3_moe",
        # Without renormalisation the gates are the softmax over all experts, so it comes before the choice.
        fields=lambda hf_config: {"moe_router_pre_softmax": not hf_config.norm_topk_prob},
    ),
}


def own_family(key: str, name: str | None) -> Family | None:
    """The family that the config's `key` names as MODULE:NAME; None where it names none: by config.json's model_type.

    Raises ConfigError where it cannot be imported or is no Family.
    """
    if name is None:
        return None
    family = load_part(key, name, {})
    if not isinstance(family, Family) or family.like not in FAMILIES:
        raise ConfigError(
            f"{key}: {name} must be a megatron_opd.weights.families.Family whose `like` is one of {', '.join(FAMILIES)}"
        )
    return family
