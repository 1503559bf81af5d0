"""The losses straight from hidden states against the same losses of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses import (
    LOSSES,
    DistillTargets,
    LossOptions,
    VocabShard,
    get_loss,
    head_loss,
    student_logprobs,
)
from tests.distributed import groups_of_two_and_four, run_distributed
from tests.losses.test_memory import _peak

TOKENS, HIDDEN, VOCAB, PADDED, K = 24, 16, 45, 48, 5
FUSED_KINDS = [name for name, entry in LOSSES.items() if entry.fused_head]
WHOLE = VocabShard.of(None, PADDED, VOCAB)


def made() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    head = draw(PADDED, HIDDEN)
    hidden = draw(TOKENS, HIDDEN)
    ids = (hidden @ head[:VOCAB].t()).topk(K, dim=1).indices
    weight = draw(TOKENS).abs()
    weight[::5] = 0
    return {
        "head": head,
        "hidden": hidden,
        "ids": ids,
        "weight": weight,
        "teacher": -draw(TOKENS, K).abs(),
        "sampled": torch.randint(VOCAB, (TOKENS,), generator=generator),
        "teacher_sampled": -draw(TOKENS).abs(),
        "advantage": draw(TOKENS),
        "rollout": -draw(TOKENS).abs(),
    }


def targets_of(x: dict[str, Tensor]) -> DistillTargets:
    return DistillTargets(x["ids"], x["teacher"], x["sampled"], x["teacher_sampled"])


def plain(kind: str, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probs and gradients through whole logits, unsharded."""
    hidden, head = (x[name].clone().requires_grad_() for name in ("hidden", "head"))
    logits = hidden @ head.t()
    own = student_logprobs(logits, x["sampled"][:, None], WHOLE)[:, 0]
    ratio = (own.detach() - x["rollout"]).exp().clamp(max=1.5)
    total = get_loss(kind)(logits, targets_of(x), x["weight"] * ratio, WHOLE)
    total = total - (x["advantage"] * own).sum()
    (total * 0.3).backward()
    return total.detach(), own.detach(), hidden.grad, head.grad


def fused(kind: str, x: dict[str, Tensor], group: dist.ProcessGroup | None, sequence: bool):
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    rows = TOKENS // size if sequence else TOKENS
    hidden = x["hidden"][rank * rows : (rank + 1) * rows] if sequence else x["hidden"]
    columns = PADDED // size
    head = x["head"][rank * columns : (rank + 1) * columns].clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    total, own = head_loss(
        get_loss(kind),
        hidden,
        head,
        targets_of(x),
        x["weight"],
        VocabShard.of(group, PADDED, VOCAB),
        LossOptions(chunk_tokens=7),
        sequence_parallel=sequence,
        advantage=x["advantage"],
        reweigh=lambda own, rows: (own - x["rollout"][rows]).exp().clamp(max=1.5),
    )
    (total * 0.3).backward()
    return total.detach(), own, hidden.grad, head.grad


def on_all_sizes(rank: int, world: int):
    x, groups = made(), groups_of_two_and_four(rank)
    return {
        (kind, size, sequence): (groups[size].rank(), fused(kind, x, groups[size], sequence))
        for kind in FUSED_KINDS
        for size in groups
        for sequence in (False, True)
    }


@pytest.fixture(scope="module")
def results():
    return run_distributed(4, on_all_sizes)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_the_fused_head_equals_the_plain_one(kind, size, sequence, results):
    x = made()
    loss, own, by_hidden, by_head = plain(kind, x)
    ranks = [(0, fused(kind, x, None, sequence))] if size == 1 else [r[kind, size, sequence] for r in results]
    for rank, (mine, logprobs, hidden, head) in ranks:
        torch.testing.assert_close(mine, loss)
        torch.testing.assert_close(logprobs, own)
        rows = TOKENS // size
        torch.testing.assert_close(hidden, by_hidden[rank * rows : (rank + 1) * rows] if sequence else by_hidden)
        columns = PADDED // size
        torch.testing.assert_close(head, by_head[rank * columns : (rank + 1) * columns])


@pytest.mark.parametrize("kind", ["full_reverse_kl", "forward_kl", "generalized_jsd"])
def test_losses_over_the_whole_vocabulary_are_refused(kind):
    x = made()
    with pytest.raises(ValueError, match=f"{type(get_loss(kind)).__name__} reads whole logits"):
        head_loss(get_loss(kind), x["hidden"], x["head"], targets_of(x), x["weight"], WHOLE)


def test_without_gradients_none_is_computed():
    x = made()
    with torch.no_grad():
        total, own = head_loss(get_loss("topk_reverse_kl"), x["hidden"], x["head"], targets_of(x), x["weight"], WHOLE)
    assert not total.requires_grad and own.shape == (TOKENS,)


def test_a_long_row_needs_less_than_a_quarter_of_the_memory():
    """The plain head keeps all logits, 64 MiB here; the fused one a chunk of them and the weight's gradient."""
    tokens, hidden_size, vocab = 2048, 32, 16_384
    head = torch.randn(vocab, hidden_size).bfloat16().requires_grad_()
    hidden = torch.randn(tokens, hidden_size).bfloat16().requires_grad_()
    ids = torch.randint(vocab, (tokens, 16))
    targets = DistillTargets(ids, torch.full(ids.shape, -3.0), ids[:, 0], torch.zeros(tokens))
    weight, loss, shard = torch.ones(tokens), get_loss("topk_reverse_kl"), VocabShard.of(None, vocab)

    def with_logits():
        options = LossOptions(16, inplace_backward=True)
        return torch.autograd.grad(loss(hidden @ head.t(), targets, weight, shard, options), (hidden, head))

    def without_logits():
        total, _ = head_loss(loss, hidden, head, targets, weight, shard, LossOptions(chunk_tokens=64))
        return torch.autograd.grad(total, (hidden, head))

    whole, chunked = _peak(with_logits), _peak(without_logits)
    assert whole > tokens * vocab * 2
    assert chunked < whole / 4
