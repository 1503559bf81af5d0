"""A built model's log-probs on given tokens, and against transformers."""

from __future__ import annotations

import torch

from megatron_opd.losses import vocab_parallel_logprobs
from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.models.cached import CachedForward
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import share_fields


def own_logprobs(model: Model, tokens: list[int]) -> torch.Tensor:
    """The model's log-probs of tokens[1:], each after what precedes it: [T-1] float32, the same on every rank."""
    forward = CachedForward(model, 1)
    fields = []
    with forward.session():
        fed = torch.tensor(tokens[:-1], device=model.device)
        logits = forward.prefill(fed, [len(tokens) - 1], [0], [0], None)
        if logits is not None:
            ids = torch.tensor(tokens[1:], device=model.device)[:, None]
            values = vocab_parallel_logprobs(logits, ids, model.vocab_shard)
            fields = [(model.layout.replica, {"logprobs": values[:, 0]})]
    return share_fields(fields, model.layout.owns_results, model.device)[0]["logprobs"]


def largest_difference(
    model: Model, directory: str, allow_pickle: bool = False, tokens: int = 64
) -> tuple[float, float]:
    """Runs one random sequence through both; collective over all ranks, the same result on each.

    transformers loads the model on every rank that holds logits: for a very large model use `tools/convert.py verify`.

    Returns:
        The largest difference of log-probs (nats) at transformers' 16 most likely tokens of each position, and the
        share of positions with the same most likely token.
    """
    ids = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(11))
    forward = CachedForward(model, 1)
    fields = []
    with forward.session():
        logits = forward.prefill(ids.to(model.device), [tokens], [0], [0], None)
        if logits is not None:
            from megatron_opd.models.compare import load_transformers, transformers_logits

            dtype = model.config.params_dtype
            reference = load_transformers(directory, dtype, dtype, allow_pickle, device=model.device)
            wanted = transformers_logits(reference, ids.to(model.device)).log_softmax(-1)
            top = wanted.topk(min(16, model.vocab_size), dim=-1)
            own = vocab_parallel_logprobs(logits, top.indices, model.vocab_shard)
            best = vocab_parallel_topk(logits, 1, model.vocab_shard)[1][:, 0]
            result = torch.stack([(own - top.values).abs().max(), (best == top.indices[:, 0]).float().mean()])
            fields = [(model.layout.replica, {"result": result[None]})]
    shared = share_fields(fields, model.layout.owns_results, model.device)
    worst = torch.cat([f["result"] for f in shared.values()])
    return float(worst[:, 0].max()), float(worst[:, 1].min())
