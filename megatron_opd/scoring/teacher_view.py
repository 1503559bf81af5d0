"""What is kept of the teacher's logits at each response position, whichever pass produced them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.losses import vocab_parallel_logprobs
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.parallel.staging import to_device
from megatron_opd.prune.signals import DriftSignal, TeacherReading
from megatron_opd.rollout.base import Segment
from megatron_opd.types import Rollout, TeacherScores

HIDDEN = "hidden"  # name of the states among the fields of a view, with score.payload: hidden
STOP = "stop_logprobs"  # of the teacher's terminators together, where they are known
_SIGNAL = "signal."  # before the names of the signal's own columns, among the other fields of a view


@dataclass(frozen=True)
class Candidates:
    """What the teacher is asked about R positions."""

    ids: Tensor  # [R, K] int64, the student's most likely tokens
    logprobs: Tensor  # [R, K] float32, the student's log-probs of them
    sampled: Tensor  # [R] int64

    @classmethod
    def of(cls, parts: Sequence[Rollout | Segment], device: torch.device) -> Candidates:
        """Of all positions of some responses, or segments of them, one behind the other."""
        return cls(
            torch.cat([p.topk_ids for p in parts]).to(device),
            torch.cat([p.topk_logprobs for p in parts]).to(device),
            torch.cat([p.tokens for p in parts]).to(device),
        )

    def __getitem__(self, positions: slice | Tensor) -> Candidates:
        return Candidates(self.ids[positions], self.logprobs[positions], self.sampled[positions])


def teacher_view(logits: Tensor, asked: Candidates, signal: DriftSignal, teacher: Model) -> Fields:
    """What the teacher says of R positions, the same on all its tensor-parallel ranks.

    Args:
        logits: [R, vocab / tp], the teacher's shard.

    Returns:
        logprobs [R, K] and sampled_logprobs [R] float32 over the full vocabulary, STOP [R] where the teacher's
        terminators are known, and the signal's own columns (`columns_of`). Raises
        ValueError where a column of the signal has another length or one of these names.
    """
    shard = teacher.vocab_shard
    columns = [asked.ids, asked.sampled[:, None]]
    if teacher.terminators:
        stops = to_device([torch.tensor(teacher.terminators)], asked.ids.device)[0]
        columns.append(stops.expand(len(asked.sampled), -1))
    ids = torch.cat(columns, 1)
    k = asked.ids.shape[1]
    values = vocab_parallel_logprobs(logits, ids, shard)
    logprobs, sampled = values[:, :k], values[:, k]
    reading = TeacherReading(logits, asked.ids, asked.logprobs, asked.sampled, logprobs, sampled, shard)
    fields = {"logprobs": logprobs, "sampled_logprobs": sampled}
    if teacher.terminators:
        fields[STOP] = values[:, k + 1 :].logsumexp(1)
    for name, column in signal.measure(reading).items():
        if name in fields:
            raise ValueError(f"{type(signal).__name__}.measure: {name} is taken by the teacher's log-probs; rename it")
        if len(column) != len(sampled):
            raise ValueError(
                f"{type(signal).__name__}.measure: column {name} has {len(column)} values for {len(sampled)} positions"
            )
        fields[_SIGNAL + name] = column
    return fields


def own_columns(fields: Fields) -> Fields:
    """The signal's own columns among the fields of a view, by their own names."""
    return {name.removeprefix(_SIGNAL): column for name, column in fields.items() if name.startswith(_SIGNAL)}


def columns_of(fields: Fields) -> Fields:
    """What `DriftSignal.events` gets of a view."""
    return {"logprobs": fields["logprobs"], "sampled_logprobs": fields["sampled_logprobs"], **own_columns(fields)}


def to_scores(fields: Fields, rollout: Rollout) -> TeacherScores:
    """A response's scores from the view of its first positions; behind them stand the student's own log-probs, which
    agree with themselves."""
    measured = len(fields["sampled_logprobs"])
    logprobs, sampled = fields["logprobs"], fields["sampled_logprobs"]
    if measured < len(rollout):
        logprobs = torch.cat([logprobs, rollout.topk_logprobs[measured:]])
        sampled = torch.cat([sampled, rollout.logprobs[measured:]])
    hidden = fields.get(HIDDEN)
    if hidden is not None and measured < len(rollout):
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, len(rollout) - measured))
    return TeacherScores(
        logprobs, sampled, own_columns(fields), measured, hidden=hidden, stop_logprobs=fields.get(STOP)
    )
