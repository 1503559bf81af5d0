"""The Triton kernels on a real GPU at the sizes they are for: pytest tests/gpu -m gpu"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_opd.kernels import fused_head_loss, kernel_backend, shard_stats, topk_loss_backward_
from megatron_opd.losses import topk_reverse_kl
from tests.kernels import checks
from tests.kernels.checks import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch.cuda finds none here"),
]

TOKENS, VOCAB, REAL = 4096, 151_936, 151_669  # Qwen's tables: the last ids are no tokens
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shard(tp: int, **changes) -> Case:
    """The last rank's, which has the padding."""
    width = VOCAB // tp
    return replace(Case(TOKENS, width, REAL - width * (tp - 1), 16, n=17, device="cuda"), **changes)


def test_the_kernels_are_what_runs():
    assert kernel_backend("cuda") == "triton"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 16, 64])
def test_statistics_of_a_shard(tp, k):
    checks.check_stats(shard(tp, k=k, rows=TOKENS if k == 16 else 512))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ties", "infinities", "nans"])
def test_statistics_of_difficult_rows(kind, dtype):
    checks.check_stats(shard(8, kind=kind, dtype=dtype, rows=64))
    checks.check_stats(Case(64, 3001, 2989, 4, device="cuda", kind=kind, dtype=dtype, strided=True))
    checks.check_stats(Case(64, 200, 133, 64, device="cuda", kind=kind, dtype=dtype))


@pytest.mark.parametrize("rows", [5, 16, 300])
def test_few_rows_are_split_over_programs(rows):
    checks.check_stats(shard(1, rows=rows))
    checks.check_stats(shard(1, rows=rows, kind="ties", k=64))


def test_rows_beyond_32_bits_of_offset():
    """16,384 rows of 151,936 are more elements than an int32 counts; the last ones are looked at."""
    logits = torch.zeros(16_384, VOCAB, dtype=torch.bfloat16, device="cuda")
    logits[-1, 151_000] = 5.0
    ids = torch.full((16_384, 1), 151_000, device="cuda")
    found = shard_stats(logits, 4, ids)
    assert found.ids[-1].tolist() == [151_000, 0, 1, 2] and found.at_ids[-1].item() == 5.0
    assert found.ids[-2].tolist() == [0, 1, 2, 3]
    grad = topk_loss_backward_(logits, found.lse, ids, torch.ones_like(found.at_ids))
    assert grad[-1, 151_000].item() > 0.99 and grad[-1, 0].item() < 0 and grad[-2, 151_000].item() > 0.99


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("inplace", [True, False])
def test_backward_of_a_shard(tp, inplace):
    checks.check_backward(shard(tp, n=16, rows=1024, inplace=inplace))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_odd_widths(dtype):
    checks.check_backward(Case(64, 5001, 4990, 0, n=64, device="cuda", dtype=dtype, strided=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_head(dtype):
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float64
    try:
        checks.check_head(Case(3000, 20_000, 19_990, 0, n=16, device="cuda", dtype=dtype), 256, 512)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_the_fused_head_needs_less_than_a_quarter_of_the_memory():
    tokens, hidden_size, width = 32_768, 1024, VOCAB // 4
    hidden = torch.randn(tokens, hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    head = (torch.randn(width, hidden_size, device="cuda") / 32).bfloat16().requires_grad_()
    ids = torch.randint(width, (tokens, 16), device="cuda")
    objective = checks.reverse_kl_objective(torch.full(ids.shape, -5.0, device="cuda"), torch.ones(tokens).cuda())

    def peak(work) -> int:
        hidden.grad = head.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def plain() -> None:
        logits = hidden @ head.t()
        teacher, ones = torch.full(ids.shape, -5.0, device="cuda"), torch.ones(tokens, device="cuda")
        topk_reverse_kl(logits, ids, teacher, ones, inplace_backward=True).backward()

    def fused() -> None:
        fused_head_loss(hidden, head, ids, objective, chunk_tokens=1024)[0].backward()

    assert peak(fused) < peak(plain) / 4
