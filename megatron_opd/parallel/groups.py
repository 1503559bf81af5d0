"""Layouts of student and teacher over the same ranks, as process groups.

The student's groups are Megatron-Core's global parallel state; the teacher's stand beside them in a collection of
their own. Rank order is Megatron's: tensor fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class Layout:
    """Where this rank lies in one model's layout, and its groups."""

    parallel: ParallelConfig
    groups: ProcessGroupCollection

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def context(self) -> tuple[int, int]:
        """Context-parallel rank and size."""
        return self.groups.cp.rank(), self.groups.cp.size()

    @property
    def replicas(self) -> int:
        """Copies of the model that can work apart: where no sequence is split (generation, scoring with a cache) the
        context-parallel ranks are further data-parallel ones."""
        return self.data_size * self.context[1]

    @property
    def replica(self) -> int:
        """The copy that this rank belongs to, in 0..replicas-1."""
        rank, size = self.context
        return self.data_rank * size + rank

    @property
    def is_first_stage(self) -> bool:
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def owns_results(self) -> bool:
        """One rank per replica: the last stage's first tensor rank, where logits end up; of a row that is split over
        context-parallel ranks each of them owns its part."""
        return self.is_last_stage and self.groups.tp.rank() == 0


def check_world(name: str, parallel: ParallelConfig, world_size: int) -> None:
    """Raises ConfigError where a layout does not divide the world."""
    if world_size % parallel.model_size:
        raise ConfigError(
            f"{name}.parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = "
            f"{parallel.model_size} does not divide the world size {world_size}; start a multiple of "
            f"{parallel.model_size} processes or change the layout"
        )
    data = world_size // parallel.pipeline
    if parallel.expert > 1 and data % parallel.expert:
        raise ConfigError(
            f"{name}.parallel.expert: {parallel.expert} does not divide the {data} ranks of a pipeline stage"
        )


def student_layout(parallel: ParallelConfig) -> Layout:
    """Initialises Megatron-Core's global parallel state with the student's layout."""
    check_world("student", parallel, dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1 if parallel.expert > 1 else None,
            create_gloo_process_groups=False,  # a second set, for a checkpoint format that is not used here
        )
    return Layout(parallel, ProcessGroupCollection.use_mpu_process_groups())


def teacher_layout(parallel: ParallelConfig) -> Layout:
    """Groups for a second layout over all ranks, apart from the global parallel state. Collective."""
    world = dist.get_world_size()
    check_world("teacher", parallel, world)
    tp, cp, pp = parallel.tensor, parallel.context, parallel.pipeline
    dense = HyperCommGrid([tp, cp, world // (tp * cp * pp), pp], ["tp", "cp", "dp", "pp"])
    expert_tp = 1 if parallel.expert > 1 else tp
    experts = HyperCommGrid(
        [expert_tp, parallel.expert, world // (expert_tp * parallel.expert * pp), pp], ["tp", "ep", "dp", "pp"]
    )
    shared = _SharedGroups()
    groups = ProcessGroupCollection(
        tp=shared.of(dense, "tp"),
        cp=shared.of(dense, "cp"),
        dp=shared.of(dense, "dp"),
        pp=shared.of(dense, "pp"),
        dp_cp=shared.of(dense, "cp", "dp"),
        mp=shared.of(dense, "tp", "pp"),
        tp_cp=shared.of(dense, "tp", "cp"),
        tp_dp_cp=shared.of(dense, "tp", "cp", "dp"),
        expt_tp=shared.of(experts, "tp"),
        ep=shared.of(experts, "ep"),
        expt_dp=shared.of(experts, "dp"),
        tp_ep=shared.of(experts, "tp", "ep"),
        tp_ep_pp=shared.of(experts, "tp", "ep", "pp"),
    )
    groups.embd, groups.pos_embd = _embedding_groups(world, pp, shared)
    return Layout(parallel, groups)


class _SharedGroups:
    """Groups by their ranks: dimensions of size one coincide with others, and every group costs a connection and, on
    gloo, a thread that wakes up a hundred times a second."""

    def __init__(self) -> None:
        self._by_ranks: dict[str, dist.ProcessGroup] = {}

    def of(self, grid: HyperCommGrid, *dims: str) -> dist.ProcessGroup:
        """This rank's group over the named dimensions of the grid."""
        return self.among(grid.get_rank_enum(list(dims)))

    def among(self, ranks: list[list[int]]) -> dist.ProcessGroup:
        """This rank's group of a partition of all ranks. Every rank asks for the same partitions in the same order."""
        partition = sorted(sorted(part) for part in ranks)
        if str(partition) not in self._by_ranks:
            self._by_ranks[str(partition)] = dist.new_subgroups_by_enumeration(partition)[0]
        return self._by_ranks[str(partition)]


def _embedding_groups(
    world: int, pp: int, shared: _SharedGroups
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """First and last stage of each pipeline share tied embeddings; the first holds position embeddings."""
    stride = world // pp
    middle = [[rank] for rank in range(stride, stride * (pp - 1))]
    ends = [sorted({start, start + stride * (pp - 1)}) for start in range(stride)]
    embedding, single = shared.among(ends + middle), shared.among([[rank] for rank in range(world)])
    stage = dist.get_rank() // stride
    return embedding if stage in (0, pp - 1) else None, single if stage == 0 else None
