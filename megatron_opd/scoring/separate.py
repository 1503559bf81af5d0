"""The teacher's own forward pass, in its own layout, over packed whole sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.config import PruneConfig
from megatron_opd.models.build import Model
from megatron_opd.parallel.exchange import Fields, share_fields
from megatron_opd.parallel.packing import plan_microbatches
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.scoring.view import Candidates, teacher_view, to_scores
from megatron_opd.types import Rollout, TeacherScores


def score_rollouts(
    teacher: Model, rollouts: list[Rollout], prune: PruneConfig, tokens_per_microbatch: int
) -> list[TeacherScores]:
    """Scores every response; collective over all ranks, the same result on each.

    The last token of a response is judged but never fed: its successor does not exist.
    """
    layout = teacher.layout
    lengths = [len(r.prompt.tokens) + len(r) - 1 for r in rollouts]
    plan = plan_microbatches(
        lengths,
        layout.data_size,
        tokens_per_microbatch,
        layout.parallel.pipeline,
        equal_counts=layout.parallel.expert > 1,
    )
    mine = plan.microbatches[layout.data_rank]
    owned: list[tuple[int, Fields]] = []
    if any(mine) or layout.parallel.expert > 1:
        rows = [teacher.row([lengths[i] for i in batch] or [1]) for batch in mine]

        def forward_step(iterator: Iterator[int], chunk: torch.nn.Module):
            number = next(iterator)
            members = [rollouts[i] for i in mine[number]]
            row, tokens = rows[number]
            fed = _inputs(members, tokens, teacher.device)
            logits = chunk(fed[None], None, None, packed_seq_params=row)
            return logits, lambda output, non_loss_data: _collect(output[0], members, prune, teacher)

        for chunk in teacher.chunks:
            chunk.eval()
        with torch.no_grad():
            found = run_schedule(
                forward_step,
                teacher.chunks,
                teacher.config,
                layout,
                range(len(mine)),
                [tokens for _, tokens in rows],
                forward_only=True,
                collect=True,
            )
        if layout.is_last_stage:
            owned = [(i, fields) for batch, part in zip(mine, found) for i, fields in zip(batch, part)]
    shared = share_fields(owned, layout.owns_results, teacher.device)
    return [to_scores(shared[i]) for i in range(len(rollouts))]


def _inputs(rollouts: list[Rollout], tokens: int, device: torch.device) -> Tensor:
    """[tokens] int64: prompts and responses without their last tokens, zeros as padding."""
    parts = [torch.cat([torch.tensor(r.prompt.tokens), r.tokens[:-1]]) for r in rollouts]
    flat = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
    return torch.nn.functional.pad(flat, (0, tokens - flat.numel())).to(device)


def _collect(logits: Tensor, rollouts: list[Rollout], prune: PruneConfig, teacher: Model) -> list[Fields]:
    """The teacher's view of each response, from a row's logits [T, vocab / tp]."""
    if not rollouts:
        return []
    wanted, at = [], 0
    for r in rollouts:
        first = at + len(r.prompt.tokens) - 1
        wanted.append(torch.arange(first, first + len(r)))
        at += len(r.prompt.tokens) + len(r) - 1
    rows = torch.cat(wanted).to(logits.device)
    asked = Candidates.of(rollouts, device=logits.device)
    view = _rows_view(logits, rows, asked, prune, teacher)
    split = {name: column.split([len(r) for r in rollouts]) for name, column in view.items()}
    return [{name: parts[i].cpu() for name, parts in split.items()} for i in range(len(rollouts))]


def _rows_view(logits: Tensor, rows: Tensor, asked: Candidates, prune: PruneConfig, teacher: Model) -> Fields:
    """In pieces, so that no second copy of the logits exists."""
    parts = []
    for start in range(0, len(rows), 2048):
        part = slice(start, start + 2048)
        piece = Candidates(asked.topk_ids[part], asked.sampled[part])
        parts.append(teacher_view(logits[rows[part]], piece, prune, teacher.vocab_size, teacher.layout.groups.tp))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
