"""Slow definitions, from docs/method.md and the papers, on whole, unsharded float64 tensors; no code of the package.

Logits here are [T, V] without padding. Differentiable functions are plain autograd.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def top_ids(logits: Tensor, k: int) -> list[list[int]]:
    """The k largest of each row, ties to the lowest id."""
    return [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:k] for row in logits.double().tolist()]


def overlap(student: Tensor, teacher: Tensor, k: int) -> list[float]:
    return [len(set(s) & set(t)) / k for s, t in zip(top_ids(student, k), top_ids(teacher, k))]


def nucleus_accepts(teacher: Tensor, sampled: list[int], k: int, p: float) -> list[bool]:
    accepted = []
    for row, order, token in zip(teacher.double().softmax(-1).tolist(), top_ids(teacher, k), sampled):
        nucleus, mass = [], 0.0
        for i in order:
            if mass >= p:
                break
            nucleus.append(i)
            mass += row[i]
        accepted.append(token in nucleus)
    return accepted


def reliability(events: list[bool], mask: list[bool], w_drop: float, w_base: float) -> dict[str, list]:
    """One response, token by token, in exact decimal arithmetic."""
    drop, count = Fraction(str(w_drop)), 0
    out: dict[str, list] = {"weight": [], "loss_weight": [], "events": []}
    for event, real in zip(events, mask):
        count += int(event and real)
        left = max(Fraction(0), 1 - drop * count)
        out["weight"].append(float(left) if real else 0.0)
        out["loss_weight"].append(float(left + Fraction(str(w_base))) if real else 0.0)
        out["events"].append(bool(event and real))
    out["effective_length"] = sum(w > 1e-8 for w in out["weight"])  # type: ignore[assignment]
    return out


def topk_reverse_kl(logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """Value (zero where the models agree) and gradient of - sum L r log p with r held constant."""
    z = logits.double().detach().requires_grad_()
    logp = torch.log_softmax(z, -1).gather(1, ids)
    with torch.no_grad():
        w = torch.softmax(logp, -1)
        reward = w * (teacher_logprobs.double() - logp)
        value = -(weight.double()[:, None] * reward).sum()
    (-(weight.double()[:, None] * reward * logp).sum()).backward()
    return float(value), z.grad


def sampled_reverse_kl(logits: Tensor, sampled: Tensor, teacher: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    z = logits.double().detach().requires_grad_()
    logp = torch.log_softmax(z, -1)[torch.arange(len(sampled)), sampled]
    advantage = teacher.double() - logp.detach()
    (-(weight.double() * advantage * logp).sum()).backward()
    return float((weight.double() * -advantage).sum()), z.grad


def divergence(kind: str, logits: Tensor, teacher: Tensor, weight: Tensor, beta: float) -> tuple[float, Tensor]:
    z = logits.double().detach().requires_grad_()
    logp, logq = torch.log_softmax(z, -1), torch.log_softmax(teacher.double(), -1)
    p, q = logp.exp(), logq.exp()
    if kind == "full_reverse_kl":
        each = (p * (logp - logq)).sum(-1)
    elif kind == "forward_kl":
        each = (q * (logq - logp)).sum(-1)
    elif kind == "generalized_jsd":
        logm = torch.log(beta * q + (1 - beta) * p)
        each = beta * (q * (logq - logm)).sum(-1) + (1 - beta) * (p * (logp - logm)).sum(-1)
    else:
        raise ValueError(kind)
    total = (weight.double() * each).sum()
    total.backward()
    return float(total.detach()), z.grad
