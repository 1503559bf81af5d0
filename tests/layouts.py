"""Models in every layout, for tests that run on several gloo processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_opd.compat.cpu_platform import apply_cpu_platform
from megatron_opd.config import ModelConfig, ParallelConfig, TeacherConfig
from megatron_opd.models.build import build_model
from megatron_opd.models.model import Model
from megatron_opd.parallel.groups import student_layout, teacher_layout
from tests.distributed import destroy_groups

CPU = torch.device("cpu")

# What is left of the world is data parallelism.
LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_sp_pp2": {"tensor": 2, "sequence": True, "pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2_sp_vpp2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "cp4": {"context": 4},
    "cp2_tp2": {"context": 2, "tensor": 2},
    "cp2_tp2_sp": {"context": 2, "tensor": 2, "sequence": True},
    "cp2_pp2": {"context": 2, "pipeline": 2},
    "cp2_vpp2": {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
}


@contextmanager
def student_model(directory: str | Path, layout: str, **extra) -> Iterator[Model]:
    """A student in Megatron-Core's global parallel state, which is gone afterwards: the next layout can follow."""
    with parallel_student(layout) as groups:
        config = ModelConfig(model=str(directory), parallel=LAYOUTS[layout], **{"precision": "fp32"} | extra)
        yield build_model("student", config, groups, CPU)


@contextmanager
def parallel_student(layout: str):
    """The student's layout as Megatron-Core's global parallel state, for as long as the block runs."""
    apply_cpu_platform()
    yield student_layout(ParallelConfig(**LAYOUTS[layout]))
    # Not after an error: the other ranks wait in some other collective, and the error must get out.
    parallel_state.destroy_model_parallel()
    destroy_groups()


def teacher_model(directory: str | Path, layout: str, **extra) -> Model:
    """A teacher in groups of its own."""
    apply_cpu_platform()
    config = TeacherConfig(model=str(directory), precision="fp32", parallel=LAYOUTS[layout], **extra)
    model = build_model("teacher", config, teacher_layout(config.parallel), CPU)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
    return model


def whole_vocabulary(model: Model, logits: torch.Tensor) -> torch.Tensor:
    """[T, vocab / tp] on each tensor rank -> [T, vocab], padding left out."""
    group = model.layout.groups.tp
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.detach().contiguous(), group=group)
    return torch.cat(shards, -1)[:, : model.vocab_size]
