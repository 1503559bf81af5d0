"""Full-vocabulary losses from the teacher's hidden states, against float64 autograd on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses import DistillTargets, LossOptions, VocabShard, get_loss, rebuilt_loss, vocab_shard
from tests import reference
from tests.distributed import groups_of_two_and_four, run_distributed
from tests.losses.test_memory import _peak as peak_bytes

TOKENS, HIDDEN, VOCAB, PADDED = 23, 12, 103, 104
LOSSES = ("full_reverse_kl", "forward_kl", "generalized_jsd")
CHUNKS = (1, 5, 1024)


def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's logits [T, V], teacher's states [T, H] and head [V, H], and prune weights [T] with zeros among them."""
    generator = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    weight[::5] = 0
    return student, hidden, head, weight


def padded(rows: Tensor) -> Tensor:
    """[V, ...] with something absurd in the padding."""
    return torch.cat([rows, rows.new_full((PADDED - VOCAB, *rows.shape[1:]), 7.0)])


def expected(name: str) -> tuple[float, Tensor]:
    """The weighted sum and its gradient, by autograd from the definition."""
    student, hidden, head, weight = made()
    return reference.divergence(name, student, hidden @ head.t(), weight, 0.5)


def parts(group: dist.ProcessGroup | None) -> dict[tuple[str, int, bool], tuple[float, Tensor]]:
    """Every loss in every chunk size, in place and not, on this rank's columns."""
    student, hidden, head, weight = made()
    shard = VocabShard.of(group, PADDED, VOCAB)
    columns = slice(shard.offset, shard.offset + shard.width)
    values = {}
    for name in LOSSES:
        for chunk in CHUNKS:
            for inplace in (False, True):
                logits = padded(student.t()).t()[:, columns].contiguous().requires_grad_()
                read = logits * 1  # in place writes over this one, as over a layer's output
                value = rebuilt_loss(
                    get_loss(name),
                    read,
                    DistillTargets(teacher_hidden=hidden),
                    weight,
                    shard,
                    padded(head)[columns].contiguous(),
                    LossOptions(chunk, inplace),
                )
                (2 * value).backward()
                values[name, chunk, inplace] = float(value.detach()), logits.grad
    return values


def both_sizes(rank: int, world: int) -> dict[int, dict]:
    """By tensor-parallel size."""
    return {size: parts(group) for size, group in groups_of_two_and_four(rank).items()}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict]]:
    """By tensor-parallel size, what each of its ranks has."""
    ranks = run_distributed(4, both_sizes)
    return {1: [parts(None)], 2: [r[2] for r in ranks[:2]], 4: [r[4] for r in ranks]}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_whole_logits(name, chunk, world, results):
    total, gradient = expected(name)
    for inplace in (False, True):
        values = [rank[name, chunk, inplace] for rank in results[world]]
        assert {value for value, _ in values} == {values[0][0]}  # every rank has the same
        assert values[0][0] == pytest.approx(total, rel=1e-10)
        whole = torch.cat([grad for _, grad in values], dim=1)
        torch.testing.assert_close(whole[:, :VOCAB], 2 * gradient, rtol=1e-9, atol=1e-12)
        assert bool((whole[:, VOCAB:] == 0).all())


def test_the_worked_numbers():
    """z = (1, 0, -1, 2) and z' = (0, 1, 0, 1): KL .32781 and its gradient; a constant added to z' changes nothing."""
    student, teacher = torch.tensor([[1.0, 0, -1, 2]]).double(), torch.tensor([[0.0, 1, 0, 1]]).double()
    for shift in (0.0, 5.0):
        logits = student.clone().requires_grad_()
        hidden = torch.ones(1, 1, dtype=torch.float64)
        value = rebuilt_loss(
            get_loss("full_reverse_kl"),
            logits,
            DistillTargets(teacher_hidden=hidden),
            torch.ones(1),
            VocabShard.of(None, 4),
            (teacher + shift).t(),
        )
        value.backward()
        assert float(value.detach()) == pytest.approx(0.32781, abs=1e-5)
        torch.testing.assert_close(
            logits.grad, torch.tensor([[0.05647, -0.15351, -0.05647, 0.15351]]).double(), rtol=0, atol=1e-5
        )


def test_two_chunks_of_logits_and_the_losss_own_are_all_the_memory():
    tokens, vocab, hidden, chunk = 64, 151_936, 64, 1
    base = torch.randn(tokens, vocab).bfloat16()
    head, states = torch.randn(vocab, hidden).bfloat16(), torch.randn(tokens, hidden).bfloat16()
    logits = base.requires_grad_()
    options, weight = LossOptions(chunk, inplace_backward=True), torch.ones(tokens)
    targets = DistillTargets(teacher_hidden=states)

    def work():
        loss = get_loss("full_reverse_kl")
        value = rebuilt_loss(loss, logits, targets, weight, vocab_shard(logits), head, options)
        return torch.autograd.grad(value, logits)

    assert peak_bytes(work) <= 0.02 * base.nbytes + (6 + 2) * chunk * vocab * 4
