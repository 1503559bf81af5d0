"""Many tensors in one copy: what arrives is what was sent."""

from __future__ import annotations

import torch

from megatron_opd.parallel import staging

TENSORS = [
    torch.arange(5),
    torch.tensor([True, False, True]),
    torch.randn(3, 7).bfloat16(),
    torch.empty(0, 4),
    torch.randn(2, 3),
    torch.tensor(7.0, dtype=torch.float64),
    torch.arange(12).view(3, 4).t(),
]


def test_parts_of_a_buffer_have_their_dtypes_shapes_and_values():
    buffer = torch.full((staging._starts(TENSORS)[-1],), 255, dtype=torch.uint8)
    parts = staging._parts(buffer, TENSORS)
    for part, tensor in zip(parts, TENSORS):
        part.copy_(tensor)
        assert part.data_ptr() % tensor.element_size() == 0
    for part, tensor in zip(parts, TENSORS):
        assert part.dtype == tensor.dtype and torch.equal(part, tensor)


def test_on_the_cpu_nothing_is_copied():
    for moved in (staging.to_device(TENSORS, torch.device("cpu")), staging.to_host(TENSORS)):
        assert all(a is b for a, b in zip(moved, TENSORS))
