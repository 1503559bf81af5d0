"""Megatron-Core's GPTModel: everything here that depends on it. 0.19 announces that HybridModel will take its place.

A chunk is one GPTModel: a pipeline stage's part of a model, or one of several with virtual stages. Who needs one of its
parts asks here; no other module names an attribute of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

__all__ = ["GPTModel"]

EMBEDDING = "embedding.word_embeddings.weight"  # names of its parameters outside the layers
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


def decoder_block_spec(
    config: TransformerConfig, transformer_engine: bool, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """Megatron-Core's spec of the layers that one pipeline stage (and virtual stage) builds."""
    return get_gpt_decoder_block_spec(config, transformer_engine, "RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank)


def build_chunk(
    config: TransformerConfig,
    spec: TransformerBlockSubmodules,
    padded_vocab_size: int,
    first: bool,
    last: bool,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
    arguments: dict[str, Any],
) -> GPTModel:
    """A chunk; `first` has the embedding, `last` the output layer. `arguments`: what else GPTModel takes."""
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        pg_collection=groups,
        vp_stage=vp_stage,
        **arguments,
    )


def run_chunk(chunk: torch.nn.Module, tokens: Tensor, packed: PackedSeqParams) -> Tensor:
    """Forward of a chunk, wrapped for training or not, on a packed row of T tokens [T] int64.

    Returns hidden states [T, 1, hidden size], on the last chunk logits [1, T, vocab / tp].
    """
    return chunk(tokens[None], None, None, packed_seq_params=packed)


def set_input(chunk: GPTModel, hidden: Tensor) -> None:
    """What the chunk before this one has returned: [T, 1, hidden size]."""
    chunk.set_input_tensor(hidden)


def given_input(chunk: GPTModel) -> Tensor:
    """What `set_input`, here or in the schedule, has set."""
    return chunk.decoder.input_tensor


def is_first(chunk: GPTModel) -> bool:
    """Whether the chunk begins with the embedding."""
    return chunk.pre_process


def is_last(chunk: GPTModel) -> bool:
    """Whether the chunk ends with the output layer."""
    return chunk.post_process


def output_layers(chunks: Sequence[GPTModel]) -> list[torch.nn.Module]:
    """This rank's output layer, in a list that is empty on all stages but the last."""
    return [chunk.output_layer for chunk in chunks if chunk.post_process]


def head_parameter(chunk: GPTModel) -> Tensor:
    """The last chunk's output layer's parameter [vocab / tp, hidden size]; the embedding's where they are tied."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight


@contextmanager
def without_output_layer(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Inside, the last chunk returns what its output layer would read. The layer stays, with its parameters."""
    layers = output_layers(chunks)
    for layer in layers:
        layer.forward = lambda hidden, **_: (hidden, None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


@contextmanager
def head_input(chunks: Sequence[GPTModel], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the output layer reads `change(hidden)` in place of its input `hidden` [T, 1, hidden size]."""

    def before(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        hidden, *rest = arguments
        return (change(hidden), *rest), keywords

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in output_layers(chunks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_numbers(chunk: GPTModel) -> list[int]:
    """Global numbers, from 0, of the layers in the chunk."""
    return [layer.layer_number - 1 for layer in chunk.decoder.layers]


def set_rotary(chunk: GPTModel, frequencies: Tensor, wrapper: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Gives the rotary embedding its frequencies [rotary dimensions / 2] and puts `wrapper` of it in its place."""
    rotary: RotaryEmbedding = chunk.rotary_pos_emb
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    chunk.rotary_pos_emb = wrapper(rotary)


def renew_fp8_copies(chunk: GPTModel) -> None:
    """The chunk's next pass makes its FP8 copies of the parameters anew; does nothing without FP8."""
    chunk.set_is_first_microbatch()
