"""FP8 through Transformer Engine: where it can run, what it asks of shapes, and what has to be kept in step with it.

Read from the sources of Transformer Engine 2.9 to 2.11 and Megatron-Core 0.16.1:

- Products in FP8 take tokens and widths in whole blocks (`TOKEN_BLOCK`, `WIDTH_BLOCK`); anything else is an assertion
  deep inside, or with sequence parallelism a failed all-gather.
- Megatron-Core's layers keep the FP8 copy of a parameter until `is_first_microbatch` is set again, which its schedules
  do. Passes outside of a schedule, those of generation, must do so themselves or they run on the parameters of the step
  before (`renew_fp8_copies`).
- Delayed scaling takes its scales from earlier passes in training, and begins with 1 (`models/fp8_scales.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.compat import gpt_model, megatron, transformer_engine
from megatron_opd.config import ConfigError, ModelConfig

# Tokens of a row, on each tensor rank, must be a multiple of this. 128: what blockwise scaling sends between ranks.
TOKEN_BLOCK = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
WIDTH_BLOCK = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def token_block(config: TransformerConfig) -> int:
    """Rows of this model hold a multiple of so many tokens per tensor rank; 1 without FP8."""
    return TOKEN_BLOCK[str(config.fp8_recipe)] if config.fp8 else 1


def check_fp8(name: str, model: ModelConfig, capability: tuple[int, int], cuda: str | None) -> None:
    """Whether a GPU of this compute capability runs the FP8 that is asked for, under torch's CUDA version.

    Raises:
        ConfigError: it does not; with the key, the value, the reason and what would work.
    """
    if not model.fp8:
        return
    here = f"this GPU has {capability[0]}.{capability[1]}"
    version = tuple(int(part) for part in (cuda or "0").split(".")[:2])
    if capability < (8, 9):
        raise ConfigError(
            f"{name}.fp8: {model.fp8} needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), {here};"
            f" set {name}.fp8: null"
        )
    if capability < (9, 0) and version < (12, 1):
        raise ConfigError(f"{name}.fp8: {model.fp8} on Ada needs CUDA 12.1, torch has {cuda}; set {name}.fp8: null")
    if model.fp8_recipe == "blockwise" and (capability < (9, 0) or version < (12, 9)):
        raise ConfigError(
            f"{name}.fp8_recipe: blockwise needs compute capability 9.0 (Hopper) and CUDA 12.9, {here} and torch "
            f"CUDA {cuda}; set {name}.fp8_recipe: tensorwise"
        )
    if model.fp8_recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        others = "tensorwise or blockwise" if capability >= (9, 0) and version >= (12, 9) else "tensorwise"
        raise ConfigError(
            f"{name}.fp8_recipe: mxfp8 needs compute capability 10.x (Blackwell), {here}; set {name}.fp8_recipe: "
            f"{others}"
        )


def shape_problems(name: str, model: ModelConfig, hf: dict[str, Any]) -> list[str]:
    """What of a Hugging Face config.json's shape FP8 cannot take: a linear layer whose width on one tensor rank is no
    whole number of blocks, and more layers in bf16 than a pipeline stage has."""
    if not model.fp8:
        return []
    layers = hf["num_hidden_layers"] // model.parallel.pipeline
    problems = []
    if model.fp8_bf16_ends > layers:
        problems.append(
            f"{name}.fp8_bf16_ends: {model.fp8_bf16_ends} is more than the {layers} layers of a pipeline stage; lower "
            "it"
        )
    block, tensor = WIDTH_BLOCK[model.fp8_recipe], model.parallel.tensor
    if model.fp8_recipe == "blockwise" and model.parallel.sequence and hf["hidden_size"] % TOKEN_BLOCK["blockwise"]:
        problems.append(
            f"{name}.fp8_recipe: blockwise with sequence parallelism sends blocks of {TOKEN_BLOCK['blockwise']}, the "
            f"hidden size is {hf['hidden_size']}; set {name}.fp8_recipe: tensorwise"
        )
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    dim = hf.get("head_dim") or hf["hidden_size"] // heads
    widths = {
        "hidden size": hf["hidden_size"],
        "attention width": heads * dim / tensor,
        "width of queries, keys and values": (heads + 2 * kv_heads) * dim / tensor,
        "FFN width": hf["intermediate_size"] / tensor,
    }
    if hf.get("moe_intermediate_size"):
        widths["experts' FFN width"] = hf["moe_intermediate_size"]
    return problems + [
        f"{name}.fp8: {model.fp8} with fp8_recipe: {model.fp8_recipe} needs multiples of {block}, the {what} is "
        f"{width:g} on each of {tensor} tensor rank(s); set {name}.fp8: null or another {name}.parallel.tensor"
        for what, width in widths.items()
        if width % block
    ]


def renew_fp8_copies(chunks: Iterable[gpt_model.GPTModel]) -> None:
    """The next pass makes its FP8 copies of the parameters anew. For passes outside of Megatron-Core's schedules."""
    for chunk in chunks:
        gpt_model.renew_fp8_copies(chunk)


def drop_fp8_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Frees the FP8 copies of the parameters; they stay on the GPU when the parameters themselves leave it."""
    for chunk in chunks:
        for module in chunk.modules():
            transformer_engine.drop_fp8_copies(module)


def fuse_gradient_accumulation(chunks: Iterable[torch.nn.Module]) -> None:
    """Gradients are added to the fp32 buffers inside their matrix product, where a kernel for that exists.

    Transformer Engine's layers bring theirs; Megatron-Core's own (the output layer, and every layer of a local build)
    use apex's. The others add afterwards: slower, the same sum. Call it once the parameters have a `main_grad`.
    """
    apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    for chunk in chunks:
        for module in chunk.modules():
            if not transformer_engine.fuse_gradient_accumulation(module) and apex:
                megatron.fuse_gradient_accumulation(module)
