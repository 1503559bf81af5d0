"""What the kernels must do, on any device and at any size, against float64 torch written from the definitions."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_opd.kernels import VocabShard, fused_head_loss, shard_stats, topk_loss_backward_

INF = float("inf")
_AT_A_TIME = 2**26  # elements that a reference holds in float64


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    real: int
    k: int
    n: int = 3  # ids per row, or candidates
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    kind: str = "normal"  # normal, ties, infinities, nans
    strided: bool = False  # rows of a wider matrix
    inplace: bool = True


def make_logits(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.rows * 7919 + case.width)
    x = torch.randn(case.rows, case.width + 48, generator=generator) * 3
    if case.kind == "ties":
        x = x.round().clamp(-2, 2)  # five values
        x[0] = 1.0
        x[-1, 0], x[-1, case.real // 2], x[-1, case.real - 1] = -0.0, 0.0, 0.0
    if case.kind == "infinities":
        x[0] = -INF
        x[1, : case.real - 2] = -INF
        x[2, case.real // 3] = INF
        x[3, ::2] = -INF
        x[4, case.real // 2 :] = torch.finfo(case.dtype).min
    x = x.to(case.device, case.dtype)
    if case.kind == "nans":
        x[0, case.real - 1] = torch.nan
        x[1, 0] = torch.nan
        x[2] = torch.nan
        x[3, case.real :] = torch.nan  # padding is never looked at
        x[4, case.real // 2] = INF
    x[:, case.real : case.real + 8] = x[:, case.real : case.real + 8].clamp(min=40)  # nor chosen, where it is large
    return x[:, 16 : 16 + case.width] if case.strided else x[:, : case.width].contiguous()


def ids_of(case: Case) -> Tensor:
    """[rows, n] local columns: real ones, repeated ones, padding, and other ranks'."""
    generator = torch.Generator().manual_seed(case.n)
    ids = torch.randint(0, case.real, (case.rows, case.n), generator=generator)
    if case.n > 2:
        ids[::2, -1] = ids[::2, 0]  # twice
        ids[1::2, -1] = case.real + 1
        ids[2::3, 1] = -5
    return ids.to(case.device)


def check_stats(case: Case) -> None:
    logits, ids = make_logits(case), ids_of(case)
    found = shard_stats(logits, case.k, ids, case.real)
    step = max(1, _AT_A_TIME // case.width)
    for start in range(0, case.rows, step):
        rows = slice(start, start + step)
        real = logits[rows, : case.real].double()
        invalid = real.isnan().any(1)
        assert torch.equal(found.invalid[rows], invalid)
        owned = (ids[rows] >= 0) & (ids[rows] < case.real)
        at = torch.where(owned, real.gather(1, ids[rows].clamp(0, case.real - 1)), 0.0)
        at = at.to(found.at_ids.dtype)
        torch.testing.assert_close(found.at_ids[rows], at, rtol=1e-6, atol=1e-6, equal_nan=True)
        lse = (real).logsumexp(1)
        lse[(real == INF).any(1)] = torch.nan  # the torch path's answer too
        torch.testing.assert_close(found.lse[rows].double(), lse, rtol=2e-6, atol=2e-6, equal_nan=True)
        if case.k:
            values, order = real.sort(dim=1, descending=True, stable=True)
            assert torch.equal(found.ids[rows][~invalid], order[~invalid, : case.k])
            assert torch.equal(found.values[rows][~invalid].double(), values[~invalid, : case.k])
            assert ((found.ids[rows] >= 0) & (found.ids[rows] < case.real)).all()
    assert found.values.dtype == logits.dtype and found.ids.dtype == torch.int64
    assert found.values.shape == found.ids.shape == (case.rows, case.k)


def check_backward(case: Case) -> None:
    logits, ids = make_logits(case), ids_of(case)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(ids.shape, generator=generator).to(case.device)
    slope[1] = 0.0  # a pruned row: zeros, whatever it holds
    logits[1, : case.real] = torch.nan
    log_z = (logits[:, : case.real].float()).logsumexp(1) + 0.25  # other ranks have some, too
    before = logits.clone()
    out = None if case.inplace else torch.full_like(logits, 7.0)
    grad = topk_loss_backward_(logits, log_z, ids, slope, case.real, out=out)
    assert grad.data_ptr() == (logits if case.inplace else out).data_ptr()
    if not case.inplace:
        assert torch.equal(logits.nan_to_num(3.0), before.nan_to_num(3.0))
    assert not grad[:, case.real :].any() and not grad[1].any()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[case.dtype]
    if case.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        tolerance *= 2  # the interpreter cuts bits off where a GPU rounds
    step = max(1, _AT_A_TIME // case.width)
    for start in range(0, case.rows, step):
        rows = slice(start, start + step)
        kept = torch.arange(start, min(start + step, case.rows), device=case.device) != 1
        z = before[rows, : case.real].double()[kept]
        g, where = slope[rows].double()[kept], ids[rows][kept]
        expected = -torch.exp(z - log_z[rows].double()[kept, None]) * g.sum(1, keepdim=True)
        owned = (where >= 0) & (where < case.real)
        expected.scatter_add_(1, where.clamp(0, case.real - 1), torch.where(owned, g, 0.0))
        torch.testing.assert_close(grad[rows, : case.real][kept].double(), expected, rtol=tolerance, atol=1e-6)


def reverse_kl_objective(teacher: Tensor, weight: Tensor) -> Any:
    """docs/method.md's loss and slope for a chunk's candidates."""

    def objective(logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        terms = weight[rows, None] * logprobs.softmax(1) * (logprobs - teacher[rows])
        return terms.sum(), terms

    return objective


def check_head(case: Case, hidden_size: int, chunk: int) -> None:
    """The fused head against float64 autograd over whole logits; scaled by the gradient that reaches it."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(case.rows, hidden_size, generator=generator).to(case.device, case.dtype).requires_grad_()
    head = (torch.randn(case.width, hidden_size, generator=generator) / 4).to(case.device, case.dtype)
    head.requires_grad_()
    ids = ids_of(replace(case, n=max(case.n, 3))).clamp(0, case.real - 1)
    teacher = -5 * torch.rand(ids.shape, generator=generator).to(case.device)
    prune_weight = torch.rand(case.rows, generator=generator).to(case.device)
    prune_weight[::3] = 0
    loss, logprobs = fused_head_loss(
        hidden,
        head,
        ids,
        reverse_kl_objective(teacher, prune_weight),
        VocabShard.of(None, case.width, case.real),
        chunk_tokens=chunk,
    )
    (loss * 0.5).backward()
    mine = [t.detach().double().requires_grad_() for t in (hidden, head)]
    logp = (mine[0] @ mine[1].t())[:, : case.real].log_softmax(1).gather(1, ids)
    with torch.no_grad():
        terms = prune_weight.double()[:, None] * logp.softmax(1) * (logp - teacher.double())
    (0.5 * (terms * logp).sum()).backward()
    exact = case.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(logprobs.double(), logp.detach(), rtol=0, atol=1e-4 if exact else 0.05)
    torch.testing.assert_close(loss.detach().double(), terms.sum(), rtol=1e-4 if exact else 0.03, atol=1e-4)
    for tensor, reference in zip((hidden, head), mine):
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert float(error) < (1e-5 if exact else 0.02), float(error)
        assert tensor.grad.dtype == tensor.dtype
    assert not head.grad[case.real :].any() and not hidden.grad[::3].any()
