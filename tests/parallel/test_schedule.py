"""The pipeline's schedules on gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_opd.compat.gpt_model import run_chunk
from megatron_opd.parallel.schedule import run_schedule
from tests.distributed import run_distributed
from tests.layouts import student_model
from tests.models.tiny_families import make


class Sent:
    """A send whose tensor is looked at when its end is waited for."""

    def __init__(self, work: dist.Work, tensor: torch.Tensor, moved: list[tuple[int, ...]]) -> None:
        self.work, self.tensor, self.moved = work, tensor, moved
        self.shape, self.address = tensor.shape, tensor.data_ptr()

    def wait(self) -> None:
        self.work.wait()
        if self.tensor.data_ptr() != self.address:
            self.moved.append(tuple(self.shape))


def freed_while_sent(rank: int, world: int, directory: str, layout: str) -> tuple[int, list[tuple[int, ...]]]:
    """The number of sends of a pass with gradients, and the shapes of those whose memory had gone at their end."""
    sends: list[Sent] = []
    moved: list[tuple[int, ...]] = []
    isend = dist.isend

    def watched(tensor: torch.Tensor, *args, **kwargs) -> Sent:
        sends.append(Sent(isend(tensor, *args, **kwargs), tensor, moved))
        return sends[-1]

    with student_model(directory, layout) as model:
        rows = [model.row([n]) for n in (9, 7, 8, 5)]

        def forward_step(numbers, chunk):
            row, total = rows[next(numbers)]
            output = run_chunk(chunk, torch.arange(total), row)
            return output, lambda out: (out.float().square().mean(), torch.zeros((), dtype=torch.int), {})

        dist.isend = dist.distributed_c10d.isend = watched
        try:
            run_schedule(
                forward_step, model.chunks, model.config, model.layout, [0, 1, 2, 3], [total for _, total in rows]
            )
        finally:
            dist.isend = dist.distributed_c10d.isend = isend
    return len(sends), moved


@pytest.mark.parametrize("layout", ["pp2", "vpp2"])
def test_what_a_stage_sends_stays_in_memory_until_it_is_sent(layout, tmp_path):
    """gloo reads a tensor until it is sent: with virtual stages one pass in twenty computed with other numbers."""
    directory = str(make("qwen3", tmp_path / "qwen3"))
    for sends, moved in run_distributed(2, freed_while_sent, directory, layout, fresh=True):
        assert sends >= 4 and moved == []
