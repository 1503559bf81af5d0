"""What compat/megatron.py says of layers, pipeline communication and optimizers, in the installed Megatron-Core."""

from __future__ import annotations

import pytest
import torch

from megatron_opd.compat.gpt_model import run_chunk
from megatron_opd.compat.megatron import (
    PLAIN_FORWARD,
    SEQUENCE_PARALLEL,
    P2PWithKnownShapes,
    base_optimizers,
    fuse_gradient_accumulation,
    is_distributed,
    plain_linears,
    restart_scheduler,
    set_sequence_parallel,
    updated_tensor,
)
from megatron_opd.config import TrainConfig
from megatron_opd.training.setup import build_optimizer, build_scheduler, wrap_ddp
from tests.distributed import run_distributed
from tests.layouts import student_model, teacher_model
from tests.models.tiny_families import make

LENGTHS = [7, 12]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(make("qwen3", tmp_path_factory.mktemp("compat") / "qwen3"))


def layers(rank: int, world_size: int, directory: str) -> dict[str, object]:
    model = teacher_model(directory, "tp2_sp")
    (chunk,) = model.chunks
    linears = [m for m in chunk.modules() if hasattr(m, PLAIN_FORWARD)]
    named = {name for m in chunk.modules() for name in SEQUENCE_PARALLEL if hasattr(m, name)}
    before = [getattr(m, PLAIN_FORWARD) for m in linears]
    set_sequence_parallel(chunk, False)
    left = {bool(getattr(m, name)) for m in chunk.modules() for name in SEQUENCE_PARALLEL if hasattr(m, name)}
    row, padded = model.row([16])
    tokens = torch.arange(padded)
    with torch.no_grad():
        usual = run_chunk(chunk, tokens, row)
        with plain_linears(chunk):
            replaced = all(getattr(m, PLAIN_FORWARD) is not old for m, old in zip(linears, before, strict=True))
            plain = run_chunk(chunk, tokens, row)
    restored = all(getattr(m, PLAIN_FORWARD) == old for m, old in zip(linears, before, strict=True))
    for module in chunk.modules():
        fuse_gradient_accumulation(module)
    fused = [bool(getattr(m, "gradient_accumulation_fusion", False)) for m in linears]
    return {
        "linears": len(linears),
        "names": named,
        "left": left,
        "difference": float((usual - plain).abs().max()),
        "replaced and restored": (replaced, restored),
        "fused": all(fused) and bool(fused),
        "config": chunk.config.sequence_parallel,
    }


def test_linear_layers_and_sequence_parallelism(directory):
    for found in run_distributed(2, layers, directory):
        assert found["linears"] == 4 * 4 + 1, "q/k/v, output, gate/up and down of four layers, and the output layer"
        assert found["names"] == set(SEQUENCE_PARALLEL), "each name is one of the installed version's"
        assert found["left"] == {False} and found["config"] is False
        assert found["difference"] < 1e-6
        assert found["replaced and restored"] == (True, True) and found["fused"]


class KnownLengths(P2PWithKnownShapes):
    """Knows the shapes of LENGTHS and counts how often it is asked for one."""

    asked = 0

    def known_shapes(self, from_previous: bool, from_next: bool) -> tuple[list[int], list[int]]:
        self.asked += from_previous
        return [LENGTHS[self.asked - 1], 1, 32] if from_previous else [0, 0, 0], [0, 0, 0]


def stages(rank: int, world_size: int, directory: str) -> list[tuple[int, ...]]:
    model = teacher_model(directory, "pp2")
    p2p = KnownLengths(model.groups.pp, model.config)
    shapes = []
    for length in LENGTHS:
        if rank == 0:
            p2p.send_forward(torch.full((length, 1, 32), float(length)), False)
        else:
            hidden = p2p.recv_forward([0, 0, 0], False)
            assert float(hidden.min()) == float(hidden.max()) == len(hidden)
            shapes.append(tuple(hidden.shape))
    assert p2p.asked == len(shapes)
    return shapes


def test_pipeline_shapes_are_asked_for_and_not_sent(directory):
    first, second = run_distributed(2, stages, directory)
    assert first == [] and second == [(7, 1, 32), (12, 1, 32)]


def optimizers(rank: int, world_size: int, directory: str, distributed: bool) -> list[tuple[int, int]]:
    """(first, last) element of each of the model's parameters, in elements of the parameter, that this rank updates."""
    train = TrainConfig(distributed_optimizer=distributed)
    ranges = []
    with student_model(directory, "tp1") as student:
        optimizer = build_optimizer(student, wrap_ddp(student, train), train)
        (base,) = base_optimizers(optimizer)
        assert is_distributed(base) == distributed
        for parameter in student.chunks[0].parameters():
            updated = updated_tensor(base, parameter)
            if updated is None:
                ranges.append((0, 0))
                continue
            start = updated.start or 0
            assert (updated.start is not None) == distributed
            values = parameter.detach().reshape(-1)[start : start + updated.tensor.numel()]
            assert torch.equal(updated.tensor.detach().reshape(-1), values.float())
            ranges.append((start, start + updated.tensor.numel()))
        scheduler = build_scheduler(optimizer, train)
        for _ in range(3):
            scheduler.step(increment=1)
        state = scheduler.state_dict()
        restart_scheduler(scheduler, state)
        assert scheduler.num_steps == 3, "it stands where the state says, not further on"
    return ranges


@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer_s_tensor_of_each_parameter(distributed, directory):
    first, second = run_distributed(2, optimizers, directory, distributed)
    if not distributed:
        assert first == second and all(start == 0 and stop > 0 for start, stop in first)
        return
    for mine, other in zip(first, second, strict=True):
        both = sorted(part for part in (mine, other) if part != (0, 0))
        assert both[0][0] == 0
        assert all(one[1] == following[0] for one, following in zip(both, both[1:])), "each element on one rank"
