"""After generation, the teacher's own forward pass over whole responses, packed, in its own layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from megatron_opd.compat.gpt_model import run_chunk
from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.models.headless import HeadInput
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.context import padded_length
from megatron_opd.parallel.exchange import Fields, share_responses
from megatron_opd.parallel.packing import plan_microbatches
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.parallel.staging import to_device, to_host
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.scoring.base import Clock, Scoring
from megatron_opd.scoring.teacher_view import HIDDEN, Candidates, teacher_view, to_scores
from megatron_opd.types import Rollout, TeacherScores

# From logits [R, vocab / tp] of R response positions, on the last stage, to fields of R values each.
View = Callable[[Tensor, Candidates], Fields]


class SeparateScoring(Scoring):
    """All responses are generated to their end, then all of their tokens are read."""

    def generate_and_score(
        self, requests: list[Request], sampling: Sampling, clock: Clock
    ) -> tuple[list[Rollout], list[TeacherScores]]:
        with clock.phase("rollout"):
            rollouts = self._generate(requests, sampling)
        tokens = self.config.train.tokens_per_microbatch
        with clock.phase("score"):
            return rollouts, self.teachers.judge(
                rollouts, lambda teacher, of_it: score_rollouts(teacher, of_it, self.signal, tokens, self.sends_hidden)
            )


def score_rollouts(
    teacher: Model,
    rollouts: list[Rollout],
    signal: DriftSignal,
    tokens_per_microbatch: int,
    sends_hidden: bool = False,
) -> list[TeacherScores]:
    """Scores every response; collective over all ranks, the same result on each."""

    def view(logits: Tensor, asked: Candidates) -> Fields:
        return teacher_view(logits, asked, signal, teacher)

    read = read_rollouts(teacher, rollouts, view, tokens_per_microbatch, sends_hidden)
    return [to_scores(fields, rollout) for fields, rollout in zip(read, rollouts)]


def top_candidates(model: Model, rollouts: list[Rollout], k: int, tokens_per_microbatch: int) -> list[Tensor]:
    """The model's own k most likely tokens at each response token, [T, k] int64 of each response. Collective."""

    def view(logits: Tensor, asked: Candidates) -> Fields:
        return {"ids": vocab_parallel_topk(logits, k, model.vocab_shard)[1]}

    return [fields["ids"] for fields in read_rollouts(model, rollouts, view, tokens_per_microbatch)]


def read_rollouts(
    model: Model, rollouts: list[Rollout], view: View, tokens_per_microbatch: int, hidden: bool = False
) -> list[Fields]:
    """What `view` takes from the logits that predict each response; collective, the same result on every rank.

    With `hidden` also what the output layer has read there, [T, hidden size], as the field HIDDEN. The last token of a
    response is scored but never fed: nothing follows it. The teacher reads its own prompts where it has any.
    """
    if model.name.startswith("teacher"):
        rollouts = [as_the_teacher_reads(r) for r in rollouts]
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
        planned = [model.row([lengths[i] for i in batch] or [1]) for batch in mine]

        def forward_step(
            iterator: Iterator[int], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[..., list[Fields]]]:
            number = next(iterator)
            members = [rollouts[i] for i in mine[number]]
            packed, tokens = planned[number]
            (fed,) = to_device([packed.take(_inputs(members, packed, tokens))], model.device)
            logits = run_chunk(chunk, fed, packed)

            def collected_of(output: Tensor, non_loss_data: bool) -> list[Fields]:
                states = head_input.take() if hidden else None
                return _view_of_responses(output[0], members, packed, view, states)

            return logits, collected_of

        for chunk in model.chunks:
            chunk.eval()
        head_input = HeadInput(model)
        with torch.no_grad(), head_input.recorded() if hidden else nullcontext():
            collected = run_schedule(
                forward_step,
                model.chunks,
                model.config,
                layout,
                range(len(mine)),
                [tokens for _, tokens in planned],
                forward_only=True,
                collect=True,
            )
        if layout.is_last_stage:
            owned = [(i, fields) for batch, part in zip(mine, collected) for i, fields in zip(batch, part)]
    return share_responses(owned, layout, model.device, [(len(r.prompt.tokens), len(r)) for r in rollouts])


def as_the_teacher_reads(rollout: Rollout) -> Rollout:
    """The same response behind the teacher's prompt."""
    prompt = rollout.prompt
    if prompt.own_teacher_tokens is None:
        return rollout
    return replace(rollout, prompt=replace(prompt, tokens=prompt.own_teacher_tokens, own_teacher_tokens=None))


def _inputs(rollouts: list[Rollout], packed: PackedRow, tokens: int) -> Tensor:
    """[tokens] int64 of the whole row: prompts and responses without their last tokens, zeros as padding."""
    fed, start = torch.zeros(tokens, dtype=torch.int64), 0
    for r, padded in zip(rollouts, packed.lengths):
        prompt = len(r.prompt.tokens)
        fed[start : start + prompt] = torch.tensor(r.prompt.tokens)
        fed[start + prompt : start + prompt + len(r) - 1] = r.tokens[:-1]
        start += padded
    return fed


def _view_of_responses(
    logits: Tensor, rollouts: list[Rollout], packed: PackedRow, view: View, hidden: Tensor | None
) -> list[Fields]:
    """The view of each response (of this rank's part of it), from logits [T / cp, vocab / tp] of a row, and from the
    states [T / cp, hidden size] behind them."""
    if not rollouts:
        return []
    predicted = torch.full((sum(packed.lengths),), -1)  # which of the candidates each token of the row predicts
    start = number = 0
    for r, padded in zip(rollouts, packed.lengths):
        first = start + len(r.prompt.tokens) - 1
        predicted[first : first + len(r)] = torch.arange(number, number + len(r))
        start, number = start + padded, number + len(r)
    predicted = packed.take(predicted)
    tokens = (predicted >= 0).nonzero()[:, 0]
    predicted = predicted[tokens]
    asked = Candidates.of(rollouts, torch.device("cpu"))[predicted]
    positions, *columns = to_device([tokens, asked.ids, asked.logprobs, asked.sampled], logits.device)
    fields = _view_in_pieces(logits, positions, Candidates(*columns), view)
    if hidden is not None:
        fields[HIDDEN] = hidden[positions]
    ends = torch.tensor([len(r) for r in rollouts]).cumsum(0)
    held = torch.bucketize(predicted, ends, right=True).bincount(minlength=len(rollouts)).tolist()
    split = {name: column.split(held) for name, column in zip(fields, to_host(list(fields.values())))}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(rollouts))]


def _view_in_pieces(logits: Tensor, tokens: Tensor, asked: Candidates, view: View) -> Fields:
    """The view of the named tokens of a row, a part of them at a time, so that no second copy of the logits exists."""
    parts = []
    for start in range(0, max(len(tokens), 1), 2048):
        piece = slice(start, start + 2048)
        parts.append(view(logits[tokens[piece]], asked[piece]))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
