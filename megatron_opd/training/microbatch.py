"""One micro-batch of the training schedule: a packed row of kept sequences and what the loss needs at each token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_opd.losses import DistillTargets
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.context import padded_length
from megatron_opd.parallel.packing import plan_microbatches
from megatron_opd.parallel.staging import to_device
from megatron_opd.types import ScoredBatch


@dataclass
class MicroBatch:
    """T tokens of this row that this rank holds; positions that predict no kept response token have prune weight 0."""

    tokens: Tensor  # [T] int64
    row: PackedRow
    targets: DistillTargets  # [T, K] and [T]
    sampled: Tensor  # [T] int64, the response token that each position predicts
    weight: Tensor  # [T] float32
    rollout_logprobs: Tensor  # [T] float32, 0 where no response token is predicted
    predicts: Tensor  # [T] bool, a kept response token is predicted here
    advantage: Tensor | None  # [T] float32, of the verifier's reward; None where no response has one
    lengths: list[int] = field(default_factory=list)  # tokens of each sequence in the row, padding left out
    # This rank's part of each response's sequence, by its index in the batch; `predicts` names the tokens that count.
    spans: dict[int, slice] = field(default_factory=dict)


def kept_tokens(batch: ScoredBatch) -> list[int]:
    """Tokens that each sequence feeds through the schedule: prompt and kept response, less the last; 0 for none."""
    return [len(r.prompt.tokens) + kept - 1 if kept else 0 for r, kept in zip(batch.rollouts, batch.kept_length)]


def plan_training(student: Model, batch: ScoredBatch, tokens_per_microbatch: int) -> tuple[tuple[int, ...], ...]:
    """This data-parallel rank's micro-batches, as lists of indices into the batch."""
    parallel = student.layout.parallel
    plan = plan_microbatches(
        [padded_length(n, parallel.context) for n in kept_tokens(batch)],
        student.layout.data_size,
        tokens_per_microbatch,
        parallel.pipeline,
        multiple_of=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        equal_counts=parallel.expert > 1,
    )
    return plan.microbatches[student.layout.data_rank]


def build_microbatch(student: Model, batch: ScoredBatch, members: tuple[int, ...], multiple: int = 1) -> MicroBatch:
    """The row of the named sequences (this rank's part of it), on this rank's device, its length a multiple of
    `multiple`.

    Without members: one padding token that weighs nothing. Without scores (score.mode: fused) the teacher's targets and
    the prune weights are 0, to be found in the training pass.
    """
    lengths = [kept_tokens(batch)[i] for i in members] or [1]
    row, total = student.row(lengths, multiple)
    width = batch.rollouts[0].topk_ids.shape[1]
    tokens = torch.zeros(total, dtype=torch.int64)
    sampled = torch.zeros(total, dtype=torch.int64)
    ids = torch.arange(width).repeat(total, 1)  # distinct ids: positions without a target weigh nothing
    teacher = torch.zeros(total, width)
    teacher_sampled, weight, logprobs = torch.zeros(total), torch.zeros(total), torch.zeros(total)
    predicts = torch.zeros(total, dtype=torch.bool)
    states = batch.scores[0].hidden if batch.scores else None
    hidden = None if states is None else states.new_zeros(total, states.shape[1])
    advantage = torch.zeros(total)
    spans: dict[int, slice] = {}
    at = 0
    for i, length, padded in zip(members, lengths, row.lengths):
        rollout, kept = batch.rollouts[i], batch.kept_length[i]
        prompt = len(rollout.prompt.tokens)
        tokens[at : at + prompt] = torch.tensor(rollout.prompt.tokens)
        tokens[at + prompt : at + length] = rollout.tokens[: kept - 1]
        where = slice(at + prompt - 1, at + length)
        spans[i] = slice(at // row.context[1], (at + padded) // row.context[1])
        sampled[where] = rollout.tokens[:kept]
        ids[where] = rollout.topk_ids[:kept]
        if batch.scores:
            teacher[where] = batch.scores[i].logprobs[:kept]
            teacher_sampled[where] = batch.scores[i].sampled_logprobs[:kept]
            weight[where] = batch.prune_weight[i][:kept]
            own_states = batch.scores[i].hidden
            if hidden is not None and own_states is not None:
                hidden[where] = own_states[:kept]
        logprobs[where] = rollout.logprobs[:kept]
        predicts[where] = True
        if batch.advantage is not None:
            advantage[where] = batch.advantage[i][:kept]
        at += padded

    columns: dict[str, Tensor] = {
        "tokens": tokens,
        "ids": ids,
        "teacher": teacher,
        "sampled": sampled,
        "teacher_sampled": teacher_sampled,
        "weight": weight,
        "logprobs": logprobs,
        "predicts": predicts,
    }
    if hidden is not None:
        columns["hidden"] = hidden
    if batch.advantage is not None:
        columns["advantage"] = advantage
    held = dict(zip(columns, to_device([row.take(column) for column in columns.values()], student.device)))
    targets = DistillTargets(
        student_ids=held["ids"],
        teacher_logprobs=held["teacher"],
        sampled_ids=held["sampled"],
        teacher_sampled_logprobs=held["teacher_sampled"],
        teacher_hidden=held.get("hidden"),
    )
    return MicroBatch(
        held["tokens"],
        row,
        targets,
        held["sampled"],
        held["weight"],
        held["logprobs"],
        held["predicts"],
        held.get("advantage"),
        lengths,
        spans,
    )
