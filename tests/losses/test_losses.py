"""Every loss, its value and its gradient, against float64 autograd on whole tensors, at TP 1, 2 and 4."""

import pytest
import torch

from megatron_opd.losses import (
    LOSSES,
    DistillTargets,
    LossOptions,
    get_loss,
    student_logprobs,
    topk_reverse_kl,
    vocab_parallel_logprobs,
    vocab_shard,
)
from tests import reference
from tests.distributed import groups_of_two_and_four, run_distributed

TOKENS, K, BETA = 23, 5, 0.3
# vocab size, columns per rank times ranks: 9 of 32 leaves whole ranks without a single real id at TP 4.
CASES = [(103, 104), (9, 32), (128, 128)]
DTYPES = ["float64", "float32", "bfloat16"]


def _shard(full, padded, rank, world):
    """This rank's columns, with a huge value behind the padding mask."""
    whole = torch.full((full.shape[0], padded), 1e4, dtype=full.dtype)
    whole[:, : full.shape[1]] = full
    return whole.chunk(world, dim=1)[rank].clone()


def _case(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    # A quarter steps: many ties, and exact in bfloat16.
    student = (torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64) * 12).round() / 4
    teacher = (torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64) * 12).round() / 4
    ids = student.topk(K, dim=1).indices
    sampled = torch.randint(vocab, (TOKENS,), generator=generator)
    weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.5
    weight[::6] = 0.0
    weight = weight.float().double()
    dtype = getattr(torch, dtype)
    return student.to(dtype), teacher.to(dtype), ids, sampled, weight


def _targets(student, teacher_shard, teacher, ids, sampled):
    logq = torch.log_softmax(teacher.double(), -1)
    return DistillTargets(
        student_ids=ids,
        teacher_logprobs=logq.gather(1, ids),
        sampled_ids=sampled,
        teacher_sampled_logprobs=logq.gather(1, sampled[:, None])[:, 0],
        teacher_logits=teacher_shard,
    )


def _loss(name):
    return get_loss(name, {"jsd_beta": BETA} if name == "generalized_jsd" else {})


def _run_all(rank, world, group=None):
    """(loss, vocab, dtype, in place) -> value and this rank's gradient, for all of them."""
    out = {}
    for vocab, padded in CASES:
        for dtype in DTYPES:
            student, teacher, ids, sampled, weight = _case(vocab, dtype)
            for name in LOSSES:
                for inplace in (False, True):
                    base = _shard(student, padded, rank, world).requires_grad_()
                    logits = base * 1  # not a leaf, as in training
                    targets = _targets(student, _shard(teacher, padded, rank, world), teacher, ids, sampled)
                    shard = vocab_shard(logits, group, vocab)
                    loss = _loss(name)(logits, targets, weight, shard, LossOptions(8, inplace))
                    (loss * 0.5).backward()
                    out[name, vocab, dtype, inplace] = float(loss.detach()), base.grad
            logits = _shard(student, padded, rank, world)
            out["logprobs", vocab, dtype] = (
                vocab_parallel_logprobs(logits, ids, vocab_shard(logits, group, vocab)),
                None,
            )
    return out


def _expected(name, vocab, dtype):
    student, teacher, ids, sampled, weight = _case(vocab, dtype)
    logq = torch.log_softmax(teacher.double(), -1)
    if name == "topk_reverse_kl":
        return reference.topk_reverse_kl(student, ids, logq.gather(1, ids), weight)
    if name == "sampled_reverse_kl":
        return reference.sampled_reverse_kl(student, sampled, logq.gather(1, sampled[:, None])[:, 0], weight)
    return reference.divergence(name, student, teacher, weight, BETA)


def _run_at_two_and_four(global_rank, _):
    return {n: _run_all(global_rank % n, n, group) for n, group in groups_of_two_and_four(global_rank).items()}


@pytest.fixture(scope="module")
def distributed():
    return run_distributed(4, _run_at_two_and_four)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_match_unsharded_float64_autograd(world, distributed):
    ranks = [_run_all(0, 1)] if world == 1 else [results[world] for results in distributed][:world]
    for vocab, _ in CASES:
        for dtype in DTYPES:
            logits, _, ids, _, _ = _case(vocab, dtype)
            logprobs = torch.log_softmax(logits.double(), -1).gather(1, ids)
            for result in ranks:
                got = result["logprobs", vocab, dtype][0]
                assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
                torch.testing.assert_close(got.double(), logprobs, rtol=1e-6, atol=1e-5)
            for name in LOSSES:
                value, gradient = _expected(name, vocab, dtype)
                # A bfloat16 gradient is rounded to 8 bits once, at the end.
                limit = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-8}[dtype]
                for inplace in (False, True):
                    label = f"{name} {vocab} {dtype} inplace={inplace} TP {world}"
                    values = {result[name, vocab, dtype, inplace][0] for result in ranks}
                    assert len(values) == 1, f"{label}: ranks disagree on the value: {values}"
                    assert abs(values.pop() - value) <= 1e-5 * abs(value), label
                    whole = torch.cat([result[name, vocab, dtype, inplace][1] for result in ranks], dim=1)
                    assert (whole[:, vocab:] == 0).all(), f"{label}: gradient on padding"
                    error = (whole[:, :vocab].double() - 0.5 * gradient).norm() / (0.5 * gradient).norm()
                    assert error < limit, f"{label}: relative gradient error {error:.2e}"
                    assert torch.equal(whole, torch.cat([r[name, vocab, dtype, False][1] for r in ranks], dim=1)), label


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_equal_to_the_student_gives_nothing_anywhere(name):
    logits = torch.randn(40, 67).mul_(5).requires_grad_()
    ids = logits.topk(K, dim=1).indices
    targets = DistillTargets(
        ids,
        vocab_parallel_logprobs(logits, ids),
        ids[:, 0],
        vocab_parallel_logprobs(logits, ids[:, 0]),
        logits.detach().clone(),
    )
    loss = _loss(name)(logits, targets, torch.ones(40), vocab_shard(logits))
    loss.backward()
    assert loss == 0.0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_fully_pruned_micro_batch_keeps_a_gradient_path(name):
    student, teacher, ids, sampled, _ = _case(103, "float32")
    student[3] = torch.nan  # what stands at a pruned position is nobody's business
    logits = student.requires_grad_()
    targets = _targets(student, teacher, teacher, ids, sampled)
    loss = _loss(name)(logits, targets, torch.zeros(TOKENS), vocab_shard(logits))
    assert loss.requires_grad and loss == 0.0
    loss.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_micro_batch_gives_zero(name):
    logits = torch.zeros(0, 16, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    targets = DistillTargets(torch.zeros(0, K).long(), torch.zeros(0, K), none, torch.zeros(0), torch.zeros(0, 16))
    loss = _loss(name)(logits, targets, torch.zeros(0), vocab_shard(logits))
    loss.backward()
    assert loss == 0.0 and logits.grad.shape == (0, 16)


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_reaches_the_loss(name):
    student, teacher, ids, sampled, _ = _case(103, "float32")
    student[3, 50] = torch.nan
    targets = _targets(student, teacher, teacher, ids, sampled)
    assert _loss(name)(student.requires_grad_(), targets, torch.ones(TOKENS), vocab_shard(student)).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_ids_that_both_models_exclude_do_not_disturb(name):
    student, teacher, ids, sampled, weight = _case(103, "float64")
    student[:, 100:] = teacher[:, 100:] = -torch.inf
    ids = student.topk(K, dim=1).indices
    sampled = sampled.clamp(max=99)
    results = []
    for width in (103, 100):
        logits = student[:, :width].clone().requires_grad_()
        targets = _targets(student, teacher[:, :width], teacher, ids, sampled)
        loss = _loss(name)(logits, targets, weight, vocab_shard(logits))
        loss.backward()
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][:, :100], results[1][1])
    assert (results[0][1][:, 100:] == 0).all()


def test_the_gradient_of_student_logprobs_is_autograds():
    student, _, ids, _, _ = _case(103, "float64")
    upstream = torch.randn(TOKENS, K, dtype=torch.float64)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    student_logprobs(ours, ids, chunk_tokens=7).backward(upstream)
    torch.log_softmax(theirs, -1).gather(1, ids).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_absent_candidates_count_for_nothing_and_impossible_ids_are_seen():
    student, teacher, ids, _, weight = _case(103, "float64")
    logq = torch.log_softmax(teacher, -1).gather(1, ids)
    absent, garbage = ids.clone(), logq.clone()
    absent[:, 3:], garbage[:, 3:] = -1, 77.0
    torch.testing.assert_close(
        topk_reverse_kl(student, absent, garbage, weight), topk_reverse_kl(student, ids[:, :3], logq[:, :3], weight)
    )
    ids[1, 0] = 103
    assert topk_reverse_kl(student, ids, logq, weight).isnan()
    assert vocab_parallel_logprobs(student, torch.full((TOKENS,), -1)).eq(-torch.inf).all()


def test_errors_name_what_is_wrong():
    student, teacher, ids, sampled, weight = _case(103, "float32")
    shard = vocab_shard(student)
    with pytest.raises(ValueError, match="loss ForwardKL needs DistillTargets.teacher_logits"):
        _loss("forward_kl")(student, DistillTargets(), weight, shard)
    with pytest.raises(ValueError, match="loss TopkReverseKL needs DistillTargets.student_ids"):
        _loss("topk_reverse_kl")(student, DistillTargets(), weight, shard)
    with pytest.raises(ValueError, match=r"teacher_logits must have the shape \[23, 103\], got \[23, 90\]"):
        _loss("forward_kl")(student, DistillTargets(teacher_logits=teacher[:, :90]), weight, shard)
    with pytest.raises(ValueError, match="vocab_size 104 must lie in 1..103"):
        topk_reverse_kl(student, ids, ids.float(), weight, vocab_size=104)
    with pytest.raises(ValueError, match="103 columns, got torch.float32"):
        vocab_parallel_logprobs(student[:, :90], ids, shard)
    with pytest.raises(ValueError, match=r"weight must have the shape \[23\], got \[22\]"):
        topk_reverse_kl(student, ids, ids.float(), weight[1:])
    with pytest.raises(ValueError, match=r"got torch.int64 \[23, 5\]"):
        topk_reverse_kl(ids, ids, ids.float(), weight)
