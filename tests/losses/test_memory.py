"""The losses never hold a full-precision copy of the logits: peak of what torch allocates on CPU while they run."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_opd.losses import DistillTargets, LossOptions, get_loss, vocab_shard
from megatron_opd.prune import topk_overlap

TOKENS, VOCAB, K, CHUNK = 64, 151_936, 16, 1


def _peak(work) -> int:
    """Most bytes allocated at once by `work`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    assert kept is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert changes, "the profiler recorded no allocations"
    now = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "name, chunks",
    [("topk_reverse_kl", 1), ("full_reverse_kl", 6), ("generalized_jsd", 12)],
)
def test_a_loss_needs_two_percent_and_its_chunks(name, chunks):
    base = torch.randn(TOKENS, VOCAB).bfloat16()
    ids = base.topk(K, dim=1).indices
    teacher = base + 1 if chunks > 1 else None
    targets = DistillTargets(ids, torch.zeros(TOKENS, K), ids[:, 0], torch.zeros(TOKENS), teacher)
    weight = torch.ones(TOKENS)
    logits = base.requires_grad_()

    def work():
        return torch.autograd.grad(
            get_loss(name)(logits, targets, weight, vocab_shard(logits), LossOptions(CHUNK, inplace_backward=True)),
            logits,
        )

    limit = 0.02 * base.nbytes + chunks * CHUNK * VOCAB * 4
    assert _peak(work) < limit


def test_the_overlap_needs_no_copy_of_the_logits():
    student = torch.randn(TOKENS, VOCAB).bfloat16()
    teacher = torch.randn(TOKENS, VOCAB).bfloat16()
    # The block maxima of a piece, the candidates of a piece, and the top ids of every token.
    assert _peak(lambda: topk_overlap(student, teacher, K)) < 0.15 * student.nbytes
