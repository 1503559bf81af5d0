"""Vocab-parallel overlap and nucleus against plain sorting, at TP 1, 2 and 4."""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_opd.losses import vocab_shard
from megatron_opd.prune import (
    count_shared,
    teacher_top_p_accept,
    topk_overlap,
    vocab_parallel_topk,
)
from tests import reference
from tests.distributed import groups_of_two_and_four, run_distributed

TOKENS = 12
# (real ids, padded ids, k): whole ranks without real ids; fewer ids a rank than k; shards wide enough for block maxima.
CASES = [(103, 104, 16), (9, 32, 5), (9, 32, 9), (40, 40, 16), (9_001, 9_004, 16), (9_001, 9_216, 3)]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def _case(vocab, padded, k, dtype):
    """Student, teacher [T, V] with many ties, infinities and signed zeros, and sampled ids."""
    generator = torch.Generator().manual_seed(vocab + k)
    student = torch.randn(TOKENS, vocab, generator=generator)
    teacher = student + 0.5 * torch.randn(TOKENS, vocab, generator=generator)
    student[:4], teacher[:4] = student[:4].mul(2).round(), teacher[:4].mul(2).round()  # ties across ranks
    student[4], teacher[4] = 0.0, 0.0  # nothing but ties
    teacher[5, ::2] = -0.0
    teacher[5, 1::2] = 0.0
    student[6, 3:] = -torch.inf  # fewer finite logits than k
    teacher[7] = torch.arange(vocab)  # the best ones on the last rank
    sampled = student.add(torch.randn(student.shape, generator=generator)).argmax(1)
    return student.to(getattr(torch, dtype)), teacher.to(getattr(torch, dtype)), sampled


def _shard(full, padded, rank, world):
    whole = torch.full((full.shape[0], padded), 6e4, dtype=full.dtype)  # a huge value behind the padding mask
    whole[:, : full.shape[1]] = full
    return whole.chunk(world, dim=1)[rank].contiguous()


def _compute(rank, world, group=None):
    out = {}
    for vocab, padded, k in CASES:
        for dtype in DTYPES:
            student, teacher, sampled = _case(vocab, padded, k, dtype)
            s, t = _shard(student, padded, rank, world), _shard(teacher, padded, rank, world)
            shard = vocab_shard(s, group, vocab)
            values, ids = vocab_parallel_topk(s, k, shard)
            out[vocab, padded, k, dtype] = {
                "overlap": topk_overlap(s, t, k, group, vocab),
                "mixed": topk_overlap(s, t.float(), k, group, vocab) if dtype == "bfloat16" else None,
                "values": values,
                "ids": ids,
                "count": count_shared(t, ids, k, shard),
                "accept": teacher_top_p_accept(t, sampled, k, 0.6, shard),
            }
    student, teacher, _ = _case(103, 104, 16, "float32")
    student[2, 99] = teacher[9, 1] = torch.nan  # on different ranks
    s, t = _shard(student, 104, rank, world), _shard(teacher, 104, rank, world)
    out["nan"] = topk_overlap(s, t, 16, group, 103)
    likeliest = teacher[:, :103].nan_to_num(-100.0).argmax(1)
    out["nan_accepted"] = teacher_top_p_accept(t, likeliest, 16, 0.5, vocab_shard(t, group, 103))
    return out


def _traffic(group):
    """Numbers handed to collectives by one overlap, per collective."""
    sent = []

    def recorded(original, message):
        def record(*args, **kwargs):
            sent.append((args[message].numel(), args[message].dtype))
            return original(*args, **kwargs)

        return record

    logits = torch.randn(TOKENS, 64).bfloat16()
    with mock.patch.multiple(dist, all_reduce=recorded(dist.all_reduce, 0), all_gather=recorded(dist.all_gather, 1)):
        topk_overlap(logits, logits, 16, group)
    return sent


def _compute_at_two_and_four(global_rank, _):
    groups = groups_of_two_and_four(global_rank)
    results = {size: _compute(global_rank % size, size, group) for size, group in groups.items()}
    return results, _traffic(groups[2])


@functools.cache
def _expected(case, dtype):
    vocab, _, k = case
    student, teacher, sampled = _case(*case, dtype)
    order = reference.top_ids(student, k)
    return {
        "overlap": torch.tensor(reference.overlap(student, teacher, k)),
        "ids": torch.tensor(order),
        "values": student.gather(1, torch.tensor(order)),
        "accept": torch.tensor(reference.nucleus_accepts(teacher, sampled.tolist(), k, 0.6)),
    }


@pytest.fixture(scope="module")
def distributed():
    return run_distributed(4, _compute_at_two_and_four)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_to_plain_sorting_on_every_rank(world, distributed):
    ranks = [_compute(0, 1)] if world == 1 else [results[world] for results, _ in distributed]
    for rank, result in enumerate(ranks):
        for case in CASES:
            for dtype in DTYPES:
                label = f"{case} {dtype} TP {world} rank {rank}"
                got, want = result[*case, dtype], _expected(case, dtype)
                for name in ("ids", "values", "overlap", "accept"):
                    assert torch.equal(got[name], want[name]), f"{name}: {label}"
                assert got["mixed"] is None or torch.equal(got["mixed"], want["overlap"]), label
                assert torch.equal(got["count"], want["overlap"] * case[2]), label
                assert got["overlap"].dtype == torch.float32
        unknown = result["nan"].isnan().nonzero().flatten().tolist()
        assert unknown == [2, 9], "a NaN reaches every rank, and only its own token"
        assert (~result["nan_accepted"]).nonzero().flatten().tolist() == [9]  # a broken token refuses its likeliest id


def test_only_values_and_one_integer_per_token_travel(distributed):
    values, counts = distributed[0][1]
    assert values == (TOKENS * 2 * 16, torch.bfloat16), "tokens x models x k logits, to each rank"
    assert counts == (TOKENS, torch.int32)


def test_the_nucleus_includes_the_token_that_crosses_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)
    every = torch.arange(4)
    assert teacher_top_p_accept(logits, every, 4, p=0.75).tolist() == [True, True, False, False]
    assert teacher_top_p_accept(logits, every, 4, p=0.85).tolist() == [True, True, True, False]
    assert teacher_top_p_accept(logits, every, 2, p=0.95).tolist() == [True, True, False, False], "k falls short of p"
    assert teacher_top_p_accept(logits, every, 4, p=1.0).all()


def test_large_k_and_no_tokens():
    student, teacher = torch.randn(5, 5000), torch.randn(5, 5000)
    want = reference.overlap(student, teacher, 600)
    torch.testing.assert_close(topk_overlap(student, teacher, 600), torch.tensor(want))
    assert topk_overlap(student[:0], teacher[:0], 600).shape == (0,)


def test_errors_name_the_numbers():
    logits = torch.randn(3, 10)
    with pytest.raises(ValueError, match="k 11 must lie in 1..10"):
        topk_overlap(logits, logits, 11)
    with pytest.raises(ValueError, match="k 9 must lie in 1..8"):
        vocab_parallel_topk(logits, 9, vocab_shard(logits, None, 8))
    with pytest.raises(ValueError, match=r"differ in shape: \[3, 10\] and \[3, 9\]"):
        topk_overlap(logits, logits[:, :9], 2)
    with pytest.raises(ValueError, match="ids has 2 tokens, the logits have 3"):
        count_shared(logits, torch.zeros(2, 4).long(), 4)
    with pytest.raises(ValueError, match="p 1.5 must lie in"):
        teacher_top_p_accept(logits, torch.zeros(3).long(), 4, p=1.5)
