"""A model's forward pass over whole answers, packed, in its own layout; the teacher's scores come from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_opd.config import PruneConfig
from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.context import padded_length
from megatron_opd.parallel.exchange import Fields, share_responses
from megatron_opd.parallel.packing import plan_microbatches
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.scoring.view import Candidates, teacher_view, to_scores
from megatron_opd.types import Rollout, TeacherScores


def score_rollouts(
    teacher: Model, rollouts: list[Rollout], prune: PruneConfig, tokens_per_microbatch: int
) -> list[TeacherScores]:
    """Scores every response; collective over all ranks, the same result on each."""

    def view(logits: Tensor, asked: Candidates) -> Fields:
        return teacher_view(logits, asked, prune, teacher.vocab_size, teacher.layout.groups.tp)

    return [to_scores(fields) for fields in read_rollouts(teacher, rollouts, view, tokens_per_microbatch)]


def top_candidates(model: Model, rollouts: list[Rollout], k: int, tokens_per_microbatch: int) -> list[Tensor]:
    """The model's own k most likely tokens at each response token, [T, k] int64 of each response. Collective."""

    def view(logits: Tensor, asked: Candidates) -> Fields:
        return {"ids": vocab_parallel_topk(logits, k, model.vocab_shard)[1]}

    return [fields["ids"] for fields in read_rollouts(model, rollouts, view, tokens_per_microbatch)]


def read_rollouts(
    model: Model,
    rollouts: list[Rollout],
    view: Callable[[Tensor, Candidates], Fields],
    tokens_per_microbatch: int,
) -> list[Fields]:
    """What `view` takes from the logits that predict each response; collective, the same result on every rank.

    The last token of a response is judged but never fed: its successor does not exist.

    Args:
        view: from logits [R, vocab / tp] of R response tokens, on the last stage, to fields of R rows each.
    """
    layout = model.layout
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
        rows = [model.row([lengths[i] for i in batch] or [1]) for batch in mine]

        def forward_step(
            iterator: Iterator[int], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[..., list[Fields]]]:
            number = next(iterator)
            members = [rollouts[i] for i in mine[number]]
            row, tokens = rows[number]
            fed = row.take(_inputs(members, row, tokens)).to(model.device)
            logits = chunk(fed[None], None, None, packed_seq_params=row)
            return logits, lambda output, non_loss_data: _collect(output[0], members, row, view)

        for chunk in model.chunks:
            chunk.eval()
        with torch.no_grad():
            found = run_schedule(
                forward_step,
                model.chunks,
                model.config,
                layout,
                range(len(mine)),
                [tokens for _, tokens in rows],
                forward_only=True,
                collect=True,
            )
        if layout.is_last_stage:
            owned = [(i, fields) for batch, part in zip(mine, found) for i, fields in zip(batch, part)]
    answers = [(len(r.prompt.tokens), len(r)) for r in rollouts]
    return share_responses(owned, layout, model.device, answers)


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
    logits: Tensor, rollouts: list[Rollout], row: PackedRow, view: Callable[[Tensor, Candidates], Fields]
) -> list[Fields]:
    """The view of each response (of this rank's part of it), from logits [T / cp, vocab / tp] of a row."""
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
    found = _rows_view(logits, rows.to(logits.device), asked, view)
    ends = torch.tensor([len(r) for r in rollouts]).cumsum(0)
    held = torch.bucketize(judged, ends, right=True).bincount(minlength=len(rollouts)).tolist()
    split = {name: column.split(held) for name, column in found.items()}
    return [{name: parts[i].cpu() for name, parts in split.items()} for i in range(len(rollouts))]


def _rows_view(logits: Tensor, rows: Tensor, asked: Candidates, view: Callable[[Tensor, Candidates], Fields]) -> Fields:
    """In pieces, so that no second copy of the logits exists."""
    parts = []
    for start in range(0, max(len(rows), 1), 2048):
        part = slice(start, start + 2048)
        piece = Candidates(asked.topk_ids[part], asked.sampled[part])
        parts.append(view(logits[rows[part]], piece))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
