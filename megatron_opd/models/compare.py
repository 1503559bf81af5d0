"""Logits of the same tokens from Megatron-Core and from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_opd.compat.gpt_model import is_first, run_chunk, set_input
from megatron_opd.models.model import Model
from megatron_opd.weights.hf_files import ModelFileError


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits [T, vocab] lie apart."""

    positions: int
    largest: float  # largest absolute difference of two logits
    position: int  # where it is
    relative: float  # `largest` over the largest absolute logit
    top1_agreement: float  # share of positions whose most likely token is the same
    per_position: Tensor  # [T] largest absolute difference at each


def difference(logits: Tensor, reference: Tensor) -> Difference:
    """Compares logits [T, vocab] with `reference` [T, vocab] in float32. NaN and infinity count as infinitely far."""
    logits, reference = logits.float(), reference.float()
    per_position = (logits - reference).abs().nan_to_num(nan=float("inf")).amax(-1)
    largest, position = per_position.max(0)
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    relative = float(largest) / float(reference.abs().max())
    return Difference(len(per_position), float(largest), int(position), relative, float(agreement), per_position)


@torch.no_grad()
def megatron_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits [T, vocab] float32 of one sequence `tokens` [T], on every rank. Collective over the model's ranks."""
    groups = model.layout.groups
    stages, stage = groups.pp.size(), groups.pp.rank()
    row, padded = model.row([len(tokens)])
    ids = torch.nn.functional.pad(tokens.to(model.device), (0, padded - len(tokens)))
    split = groups.tp.size() if model.config.sequence_parallel else 1
    dtype = model.config.params_dtype
    out = torch.empty(padded // split, 1, model.config.hidden_size, dtype=dtype, device=model.device)
    training = [chunk.training for chunk in model.chunks]
    for number, chunk in enumerate(model.chunks):
        chunk.eval()
        for turn in range(stages):  # one stage computes, the others wait for its output
            last = turn == stages - 1 and number == len(model.chunks) - 1
            if turn == stage:
                if not is_first(chunk):
                    set_input(chunk, out)
                out = run_chunk(chunk, ids, row).contiguous()
            elif last:
                width = model.padded_vocab_size // groups.tp.size()
                out = torch.empty(1, padded, width, dtype=dtype, device=model.device)
            if stages > 1:
                dist.broadcast(out, dist.get_global_rank(groups.pp, turn), group=groups.pp)
    for chunk, was in zip(model.chunks, training, strict=True):
        chunk.train(was)
    shard = out.reshape(padded, -1).float()
    shards = [torch.empty_like(shard) for _ in range(groups.tp.size())]
    dist.all_gather(shards, shard, group=groups.tp)
    return torch.cat(shards, -1)[: len(tokens), : model.vocab_size]


def load_transformers(
    hf_dir: str | Path,
    stored: torch.dtype,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The transformers model of a directory in `dtype`, its parameters rounded to `stored` before. Raises
    ModelFileError."""
    safetensors = None if allow_pickle else True
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=stored, local_files_only=True, trust_remote_code=False, use_safetensors=safetensors
        )
    except Exception as error:  # transformers raises whatever its parts raise
        reason = " ".join(str(error).split())[:500]
        raise ModelFileError(f"{hf_dir}: transformers cannot load it: {reason}") from error
    module: torch.nn.Module = model  # transformers' own `to` is a decorator without types
    module.to(device, dtype).eval()
    return model


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [T, vocab] float32 of one sequence `tokens` [T]."""
    return model(input_ids=tokens[None], use_cache=False).logits[0].float()
