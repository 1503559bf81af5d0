"""`gpu` parts kernels and memory: passes over a shard against floor and torch; the loss, head included, and fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmark.gpu_common import Bench, K, Report
from megatron_opd.kernels import kernel_backend, shard_stats, topk_loss_backward_
from megatron_opd.losses import DistillTargets, LossOptions, VocabShard, get_loss, head_loss

CHECKED = 64  # rows whose values are compared before anything is timed


def kernels(bench: Bench, report: Report) -> None:
    """Kernel 1 (log-sum-exp, top-k and chosen logits) and kernel 2 (the backward, in place) on the shards of each TP.

    Floors: kernel 1 must read the shard once, kernel 2 read and write it once, at the bandwidth of a copy.
    """
    bandwidth = bench.copy_bandwidth()
    report.add(what="copy", gb_per_s=bandwidth / 1e9, backend=kernel_backend(bench.device, torch.bfloat16))
    for tokens in bench.sizes["kernel_tokens"]:
        for tensor in bench.sizes["tensor"]:
            what = {"tokens": tokens, "tensor": tensor, "columns": -(-bench.sizes["vocab"] // tensor)}
            with report.attempt(bench, what="statistics", **what):
                logits, ids, _ = _shard(bench, tokens, what["columns"])
                _check_statistics(logits[:CHECKED], ids[:CHECKED])
                _one_pass(bench, report, what, logits, ids, logits.nbytes / bandwidth)
            with report.attempt(bench, what="backward", **what):
                logits, ids, slope = _shard(bench, tokens, what["columns"])
                _check_backward(logits[:CHECKED], ids[:CHECKED], slope[:CHECKED])
                _backward(bench, report, what, logits, ids, slope, 2 * logits.nbytes / bandwidth)


def _shard(bench: Bench, tokens: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random bf16 logits [tokens, columns] in pieces, chosen ids [tokens, K + 1] and slopes of a loss."""
    source = torch.Generator(bench.device).manual_seed(0)
    logits = torch.empty(tokens, columns, dtype=torch.bfloat16, device=bench.device)
    for rows in logits.split(256):
        rows.copy_(torch.randn(rows.shape, generator=source, device=bench.device) * 2)
    ids = torch.randint(columns, (tokens, K + 1), generator=source, device=bench.device)
    slope = torch.randn(tokens, K + 1, generator=source, device=bench.device) / tokens
    return logits, ids, slope


def _check_statistics(logits: Tensor, ids: Tensor) -> None:
    found = shard_stats(logits, K, ids)
    wide = logits.double()
    assert torch.allclose(found.lse.double(), wide.logsumexp(-1), atol=1e-4), "log-sum-exp"
    assert torch.equal(found.values.double(), wide.topk(K, -1).values), "top-k"
    assert torch.equal(found.at_ids.double(), wide.gather(1, ids)), "chosen logits"


def _check_backward(logits: Tensor, ids: Tensor, slope: Tensor) -> None:
    wide = logits.double().requires_grad_()
    (wide.log_softmax(-1).gather(1, ids) * slope.double()).sum().backward()
    log_z = logits.float().logsumexp(-1)
    found = topk_loss_backward_(logits.clone(), log_z, ids, slope)
    scale = float(wide.grad.abs().max())
    assert float((found.double() - wide.grad).abs().max()) < 0.01 * scale, "gradient"


def _one_pass(bench: Bench, report: Report, what: dict, logits: Tensor, ids: Tensor, floor: float) -> None:
    ours = bench.kernel_seconds(lambda: shard_stats(logits, K, ids))
    theirs = {
        "log_softmax": bench.kernel_seconds(lambda: logits.log_softmax(-1, dtype=torch.float32)),
    }
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    theirs["topk"] = bench.kernel_seconds(lambda: logprobs.topk(K, dim=-1))
    theirs["gather"] = bench.kernel_seconds(lambda: logprobs.gather(1, ids))
    total = sum(t["median"] for t in theirs.values())
    report.add(
        what="statistics",
        **what,
        seconds=ours["median"],
        of_floor=ours["median"] / floor,
        torch_seconds=total,
        faster_than_torch=total / ours["median"],
        spread=ours,
        torch=theirs,
    )


def _backward(
    bench: Bench, report: Report, what: dict, logits: Tensor, ids: Tensor, slope: Tensor, floor: float
) -> None:
    log_z = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(256)])
    # in place: from the second time on over its own output, which costs the same
    ours = bench.kernel_seconds(lambda: topk_loss_backward_(logits, log_z, ids, slope))

    def theirs() -> None:
        grad = logits.softmax(-1, dtype=torch.float32).mul_(-slope.sum(1, keepdim=True)).scatter_add_(1, ids, slope)
        logits.copy_(grad)

    plain = bench.kernel_seconds(theirs)
    report.add(
        what="backward",
        **what,
        seconds=ours["median"],
        of_floor=ours["median"] / floor,
        torch_seconds=plain["median"],
        faster_than_torch=plain["median"] / ours["median"],
        spread=ours,
        torch=plain,
    )


def memory(bench: Bench, report: Report) -> None:
    """The loss from hidden states to the gradients of hidden states and head: with whole logits, and fused."""
    for tokens in bench.sizes["loss_tokens"]:
        found: dict[str, dict[str, Any]] = {}
        for way in ("plain", "fused"):
            with report.attempt(bench, what=way, tokens=tokens):
                found[way] = _loss(bench, tokens, way)
                report.add(what=way, tokens=tokens, **found[way])
        if len(found) == 2:
            plain, fused = found["plain"], found["fused"]
            report.add(
                what="fused against plain",
                tokens=tokens,
                memory=fused["peak_bytes"] / plain["peak_bytes"],
                time=fused["seconds"] / plain["seconds"],
                loss_difference=abs(fused["loss"] - plain["loss"]) / max(abs(plain["loss"]), 1e-9),
            )


def _loss(bench: Bench, tokens: int, way: str) -> dict[str, Any]:
    """Time and peak memory of forward and backward, beyond hidden states, head and targets."""
    vocab, width, chunk = bench.sizes["vocab"], bench.sizes["loss_hidden"], bench.sizes["loss_chunk"]
    source = torch.Generator(bench.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=bench.device)

    hidden = draw(tokens, width).bfloat16().requires_grad_()
    head = (draw(vocab, width) / width**0.5).bfloat16().requires_grad_()
    ids = torch.randint(vocab - K, (tokens, 1), generator=source, device=bench.device)
    ids = ids + torch.arange(K, device=bench.device)
    teacher = draw(tokens, K).log_softmax(-1) - 5
    targets = DistillTargets(
        student_ids=ids, teacher_logprobs=teacher, sampled_ids=ids[:, 0], teacher_sampled_logprobs=teacher[:, 0]
    )
    weight = torch.ones(tokens, device=bench.device)
    loss, shard = get_loss("topk_reverse_kl"), VocabShard.of(None, vocab)
    options = LossOptions(chunk, inplace_backward=True)
    values: list[Tensor] = []

    def work() -> None:
        hidden.grad = head.grad = None
        if way == "fused":
            total = head_loss(loss, hidden, head, targets, weight, shard, options)[0]
        else:
            total = loss(hidden @ head.t(), targets, weight, shard, options)
        (total / tokens).backward()
        values[:] = [total.detach() / tokens]

    peak = bench.peak_bytes(work)
    seconds = bench.seconds(work)
    return {"seconds": seconds["median"], "peak_bytes": peak, "loss": float(values[0]), "spread": seconds}
