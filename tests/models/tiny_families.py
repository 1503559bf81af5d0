"""Tiny random models of every supported family, written by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 101  # prime: every tensor-parallel size above 1 needs padding

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_MOE = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

FAMILIES: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig], dict]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_yarn": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "rope_parameters": _YARN}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_MOE, "norm_topk_prob": True},
    ),
    "qwen3_moe_softmax_first": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_MOE, "norm_topk_prob": False},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama2": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": _LINEAR}),
    "llama3_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "llama_9_heads": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}


def make(family: str, directory: str | Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **extra) -> Path:
    """Writes a random model of `family`; `extra` overrides configuration keys, `shard` the size of a file."""
    model_class, config_class, special = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**_COMMON, **special, **extra}))
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which transformers starts at 1 and 0
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True, temperature=0.6)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return Path(directory)
