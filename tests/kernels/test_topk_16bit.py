"""The CPU's top-k of 16-bit logits against a stable float64 sort, where its shortcuts on bits could go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_opd.kernels import local_topk
from megatron_opd.kernels.numpy_topk import numpy_topk

INF, NAN = float("inf"), float("nan")
ROWS, WIDTH, K = 131, 2 * 16 * 64 + 37, 16  # more rows than are taken together, and a tail outside the groups


def normal() -> Tensor:
    return torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(0))


def around_zero() -> Tensor:
    """The bound falls on zeros of both signs, and on the tail's."""
    x = -normal().abs() - 1
    x[:, 5::300] = 0.0
    x[:, 7::200] = -0.0
    x[:, -1] = -0.0
    return x


def extremes() -> Tensor:
    x = normal()
    x[0] = -INF
    x[1, 100:] = -INF
    x[2, 50::9] = INF
    x[3] = -1e-42  # rounds to -0.0 or to a subnormal
    x[4, ::2] = 65504.0
    x[:, -3] += 10
    return x


CASES = {
    "positive bound": normal,
    "negative": lambda: normal() - 30,
    "few positive": lambda: normal() - 3.2,
    "ties": lambda: (normal() * 4).round(),
    "around zero": around_zero,
    "extremes": extremes,
    "equal": lambda: torch.full((ROWS, WIDTH), -2.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strided", [False, True], ids=["whole", "strided"])
def test_the_order_is_by_value_then_by_id(case, dtype, strided):
    x = CASES[case]().to(dtype)
    if strided:
        x = torch.cat([x, torch.full((ROWS, 11), INF, dtype=dtype)], 1)[:, :WIDTH]
    values, ids, invalid = local_topk(x, K)
    wanted = x.double().sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, wanted.indices[:, :K])
    assert torch.equal(values.double(), wanted.values[:, :K]) and not invalid.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shift", [0, -30])
def test_a_nan_of_either_sign_is_seen_and_infinities_are_none(dtype, shift):
    x = (normal() + shift).to(dtype)
    x[0, 3], x[2, -1], x[4] = NAN, NAN, NAN
    negative = x.view(torch.int16)  # torch rounds to a positive NaN, a processor's own is negative
    negative[1, 3], negative[3, -1], negative[5] = -1, -1, -1
    x[6, 0], x[7, 0] = INF, -INF
    assert local_topk(x, K)[2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_shortcut_is_taken_where_it_pays():
    assert numpy_topk(normal().bfloat16(), K) is not None
    assert numpy_topk(normal().bfloat16()[:, : 2 * K * 64 - 1], K) is None  # too narrow
    assert numpy_topk(torch.zeros((ROWS, 9000), dtype=torch.bfloat16), K) is None  # all ties
