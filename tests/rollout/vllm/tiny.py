"""Tiny random models, prompts and the reference that the vLLM tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_opd.rollout.base import Request
from megatron_opd.types import Prompt, Rollout

VOCAB, MAX_LEN = 512, 128
EOS = set(range(10))
PROBE = list(range(20, 50))
# Compiling vLLM's samplers takes 10 to 30 s: processes that set this run them as they are written.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}


def make_models(folder: Path) -> tuple[str, str]:
    """Two random Qwen3 with the same config, tied embeddings (the harder case of a hand-over) and different values."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.15,
        )
        paths.append(str(folder / f"model{seed}"))
        Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(paths[-1])
    return paths[0], paths[1]


def load(path: str) -> Qwen3ForCausalLM:
    """The reference: transformers, fp32."""
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def named(model: Qwen3ForCausalLM) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """What the trainer hands over: each parameter under its Hugging Face name, tied ones once."""
    return lambda: ((name, parameter.detach()) for name, parameter in model.named_parameters())


def requests(count: int) -> list[Request]:
    """Prompts of different lengths; every two answers share a prompt."""
    prompts = [Prompt(uid, "", [100 + uid, *range(60, 64 + uid % 3)]) for uid in range((count + 1) // 2)]
    return [Request(prompts[i // 2], i) for i in range(count)]


def long_requests(count: int, length: int) -> list[Request]:
    """Prompts of `length` random tokens."""
    tokens = torch.randint(10, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [Request(Prompt(i, "", row), i) for i, row in enumerate(tokens)]


def response_logprobs(model: Qwen3ForCausalLM, rollout: Rollout) -> Tensor:
    """Log-probs [T, V] of every response position."""
    tokens = rollout.prompt.tokens + rollout.tokens.tolist()
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs[len(rollout.prompt.tokens) - 1 : -1]


def probe_reference(model: Qwen3ForCausalLM) -> Tensor:
    """Log-probs [T-1] of PROBE."""
    with torch.no_grad():
        logprobs = model(torch.tensor([PROBE])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]


def worst_gap(model: Qwen3ForCausalLM, rollouts: list[Rollout]) -> float:
    """Largest difference of sampled and of top-K log-probs to the reference; also checks the candidates' ids."""
    worst = 0.0
    for rollout in rollouts:
        logprobs = response_logprobs(model, rollout)
        sampled = logprobs.gather(1, rollout.tokens[:, None])[:, 0]
        values, _ = logprobs.topk(rollout.topk_ids.shape[1])
        worst = max(worst, (sampled - rollout.logprobs).abs().max().item())
        if values.numel():
            worst = max(worst, (values - rollout.topk_logprobs).abs().max().item())
            worst = max(worst, (logprobs.gather(1, rollout.topk_ids) - values).abs().max().item())
    return worst


def texts(rollouts: list[Rollout]) -> list[tuple[list[int], str]]:
    """Tokens and end reasons."""
    return [(rollout.tokens.tolist(), rollout.end_reason) for rollout in rollouts]


class Watcher:
    """Records what it sees and stops the answers of `indices` once they reach `length` tokens."""

    def __init__(self, indices: set[int] | None = None, length: int = 0):
        self.indices, self.length = indices or set(), length
        self.seen: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, segments) -> set[int]:
        self.calls.append([(part.request.index, part.start) for part in segments])
        for part in segments:
            index, tokens = part.request.index, self.seen.setdefault(part.request.index, [])
            assert part.start == len(tokens) and index not in self.ended
            assert part.topk_ids.shape[0] == part.topk_logprobs.shape[0] == len(part.tokens)
            tokens += part.tokens.tolist()
            if part.finished:
                self.ended.add(index)
        return {i for i in self.indices if len(self.seen.get(i, [])) >= self.length}
