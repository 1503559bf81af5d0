"""`doctor` says what training really allocates."""

from __future__ import annotations

import pytest
import torch

from megatron_opd.commands.doctor import training_bytes
from megatron_opd.compat.megatron import base_optimizers
from megatron_opd.config.training import TrainConfig
from megatron_opd.training.setup import build_optimizer, wrap_ddp
from tests.distributed import run_distributed
from tests.layouts import student_model
from tests.models.tiny_families import make

CASES = [
    (layout, precision, distributed)
    for layout in ("tp1", "tp2_sp", "pp2")
    for precision in ("fp32", "bf16")
    for distributed in (False, True)
]


def allocated(rank: int, world: int, directory: str) -> list[tuple[int, int]]:
    """Bytes said, and bytes of gradient buffers, moments and main copies after one update, of each case."""
    both = []
    for layout, precision, distributed in CASES:
        with student_model(directory, layout, precision=precision) as student:
            train = TrainConfig(distributed_optimizer=distributed)
            ddp = wrap_ddp(student, train)
            optimizer = build_optimizer(student, ddp, train)
            for parameter in student.chunks[0].parameters():
                parameter.main_grad.fill_(1e-3)
            optimizer.step()
            buffers = [b for d in ddp for b in [*d.buffers, *d.expert_parallel_buffers]]
            held = {b.grad_data.untyped_storage().data_ptr(): b.grad_data.untyped_storage().nbytes() for b in buffers}
            own = {p.data.untyped_storage().data_ptr() for c in student.chunks for p in c.parameters()}
            for base in base_optimizers(optimizer):
                tensors = [p for group in base.optimizer.param_groups for p in group["params"]]
                tensors += [t for s in base.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
                for tensor in tensors:
                    if tensor.untyped_storage().data_ptr() not in own:
                        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            both.append((training_bytes(student, distributed), sum(held.values())))
    return both


def test_gradients_and_optimizer_state_are_what_is_allocated_within_a_tenth(tmp_path):
    make("qwen3", tmp_path)
    for rank, both in enumerate(run_distributed(4, allocated, str(tmp_path))):
        for case, (said, held) in zip(CASES, both):
            assert said == pytest.approx(held, rel=0.1), (rank, case)
