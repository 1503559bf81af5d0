"""One training step as docs/method.md writes it, on whole transformers models: padded, uncut, masked. None of our code.

Written from the formulas, slow and plain; the loss and everything behind the logits in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass
class Settings:
    k: int = 16
    threshold: float = 0.7
    w_drop: float = 0.01
    w_base: float = 0.5
    kind: str = "topk_reverse_kl"
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-4
    weight_decay: float = 0.1
    clip: float = 0.5
    steps: int = 2


@dataclass
class Result:
    candidates: list[Tensor]  # per answer [T, k] ids: the student's before the first step
    candidate_logprobs: list[Tensor]
    sampled_logprobs: list[Tensor]
    teacher_logprobs: list[Tensor]  # [T, k], at the student's candidates
    overlap: list[Tensor]
    prune_weight: list[Tensor]
    effective_length: list[int]
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last step


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def logprobs(model, answers: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Per answer [T, V] float64 at its response positions, from one padded batch."""
    longest = max(len(p) + len(r) for p, r in answers)
    ids, mask = torch.zeros(len(answers), longest, dtype=torch.int64), torch.zeros(len(answers), longest)
    for i, (prompt, response) in enumerate(answers):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, : len(prompt) + len(response)] = 1
    logits = model(ids, attention_mask=mask).logits.double().log_softmax(-1)
    return [logits[i, len(p) - 1 : len(p) + len(r) - 1] for i, (p, r) in enumerate(answers)]


def run(student_dir, teacher_dir, answers: list[tuple[list[int], list[int]]], settings: Settings) -> Result:
    student, teacher = load(student_dir), load(teacher_dir)
    sampled = [torch.tensor(response) for _, response in answers]
    with torch.no_grad():
        q_all = logprobs(teacher, answers)
        p_all = logprobs(student, answers)
    top = [p.topk(settings.k) for p in p_all]
    result = Result(
        candidates=[t.indices for t in top],
        candidate_logprobs=[t.values.float() for t in top],
        sampled_logprobs=[p.gather(1, y[:, None])[:, 0].float() for p, y in zip(p_all, sampled)],
        teacher_logprobs=[q.gather(1, t.indices).float() for q, t in zip(q_all, top)],
        overlap=[],
        prune_weight=[],
        effective_length=[],
    )
    for q, t in zip(q_all, top):
        theirs = q.topk(settings.k).indices.tolist()
        shares = [len(set(a) & set(b)) / settings.k for a, b in zip(t.indices.tolist(), theirs)]
        count, weights, effective = 0, [], 0
        for share in shares:
            count += share < settings.threshold
            reliability = min(1.0, max(0.0, 1.0 - settings.w_drop * count))
            effective += reliability > 1e-8
            weights.append(reliability * (reliability > 1e-8) + settings.w_base)
        result.overlap.append(torch.tensor(shares))
        result.prune_weight.append(torch.tensor(weights, dtype=torch.float64))
        result.effective_length.append(effective)

    named = dict(student.named_parameters())
    first = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    second = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    tokens = sum(len(y) for y in sampled)
    for step in range(1, settings.steps + 1):
        student.zero_grad()
        value, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for p, q, ids, y, weight in zip(
            logprobs(student, answers), q_all, result.candidates, sampled, result.prune_weight
        ):
            if settings.kind == "topk_reverse_kl":
                mine, theirs = p.gather(1, ids), q.gather(1, ids)
                with torch.no_grad():
                    reward = torch.softmax(mine, -1) * (theirs - mine)
                value = value - (weight[:, None] * reward).sum()
                surrogate = surrogate - (weight[:, None] * reward * mine).sum()
            elif settings.kind == "sampled_reverse_kl":
                mine, theirs = (x.gather(1, y[:, None])[:, 0] for x in (p, q))
                advantage = (theirs - mine).detach()
                value = value - (weight * advantage).sum()
                surrogate = surrogate - (weight * advantage * mine).sum()
            elif settings.kind == "full_reverse_kl":
                each = (p.exp() * (p - q)).sum(-1)
                value, surrogate = value + (weight * each).sum(), surrogate + (weight * each).sum()
            elif settings.kind == "forward_kl":
                each = (q.exp() * (q - p)).sum(-1)
                value, surrogate = value + (weight * each).sum(), surrogate + (weight * each).sum()
            elif settings.kind == "generalized_jsd":  # at loss.jsd_beta's default, one half
                m = torch.log((p.exp() + q.exp()) / 2)
                each = ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1)) / 2
                value, surrogate = value + (weight * each).sum(), surrogate + (weight * each).sum()
            else:
                raise ValueError(settings.kind)
        (surrogate / tokens).backward()
        result.losses.append(float(value.detach() / tokens))
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in named.values()))
        result.grad_norms.append(norm)
        scale = min(1.0, settings.clip / (norm + 1e-6))
        with torch.no_grad():
            for name, p in named.items():
                g = p.grad.double() * scale
                first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * g
                second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * g * g
                m = first[name] / (1 - settings.beta1**step)
                v = second[name] / (1 - settings.beta2**step)
                decay = 0.0 if p.dim() == 1 else settings.weight_decay  # norms and biases are not decayed
                p.copy_(p.double() * (1 - settings.lr * decay) - settings.lr * m / (v.sqrt() + settings.eps))
    result.parameters = dict(_by_checkpoint_name(named))
    return result


def _by_checkpoint_name(named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """transformers holds a layer's experts in one tensor; a checkpoint has them one by one."""
    for name, parameter in named.items():
        kind = name.rpartition(".experts.")[2]
        if kind not in ("gate_up_proj", "down_proj"):
            yield name, parameter.detach().clone()
            continue
        for expert, weight in enumerate(parameter.detach().clone()):
            halves = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
            for half, own in zip(halves, ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)):
                yield f"{name.removesuffix(kind)}{expert}.{own}.weight", half
