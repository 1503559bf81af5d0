"""The teacher's own forward pass, in its own layout, over packed whole sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opd.config import PruneConfig
from megatron_opd.models.build import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.context import padded_length
from megatron_opd.parallel.exchange import Fields, share_answers
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
        [padded_length(n, layout.parallel.context) for n in lengths],
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
            fed = row.take(_inputs(members, row, tokens)).to(teacher.device)
            logits = chunk(fed[None], None, None, packed_seq_params=row)
            return logits, lambda output, non_loss_data: _collect(output[0], members, row, prune, teacher)

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
    answers = [(len(r.prompt.tokens), len(r)) for r in rollouts]
    return [to_scores(fields) for fields in share_answers(owned, layout, teacher.device, answers)]


def _inputs(rollouts: list[Rollout], row: PackedRow, tokens: int) -> Tensor:
    """[tokens] int64 of the whole row: prompts and responses without their last tokens, zeros as padding."""
    fed, at = torch.zeros(tokens, dtype=torch.int64), 0
    for r, padded in zip(rollouts, row.lengths):
        prompt = len(r.prompt.tokens)
        fed[at : at + prompt] = torch.tensor(r.prompt.tokens)
        fed[at + prompt : at + prompt + len(r) - 1] = r.tokens[:-1]
        at += padded
    return fed


def _collect(
    logits: Tensor, rollouts: list[Rollout], row: PackedRow, prune: PruneConfig, teacher: Model
) -> list[Fields]:
    """The teacher's view of each response (of this rank's part of it), from logits [T / cp, vocab / tp] of a row."""
    if not rollouts:
        return []
    asked = Candidates.of(rollouts, device=logits.device)
    judged = torch.full((sum(row.lengths),), -1)  # which of the candidates belong to each token of the row
    at = behind = 0
    for r, padded in zip(rollouts, row.lengths):
        first = at + len(r.prompt.tokens) - 1
        judged[first : first + len(r)] = torch.arange(behind, behind + len(r))
        at, behind = at + padded, behind + len(r)
    judged = row.take(judged)
    rows = (judged >= 0).nonzero()[:, 0]
    judged = judged[rows]
    asked = Candidates(asked.topk_ids[judged.to(logits.device)], asked.sampled[judged.to(logits.device)])
    view = _rows_view(logits, rows.to(logits.device), asked, prune, teacher)
    ends = torch.tensor([len(r) for r in rollouts]).cumsum(0)
    held = torch.bucketize(judged, ends, right=True).bincount(minlength=len(rollouts)).tolist()
    split = {name: column.split(held) for name, column in view.items()}
    return [{name: parts[i].cpu() for name, parts in split.items()} for i in range(len(rollouts))]


def _rows_view(logits: Tensor, rows: Tensor, asked: Candidates, prune: PruneConfig, teacher: Model) -> Fields:
    """In pieces, so that no second copy of the logits exists."""
    parts = []
    for start in range(0, max(len(rows), 1), 2048):
        part = slice(start, start + 2048)
        piece = Candidates(asked.topk_ids[part], asked.sampled[part])
        parts.append(teacher_view(logits[rows[part]], piece, prune, teacher.vocab_size, teacher.layout.groups.tp))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
