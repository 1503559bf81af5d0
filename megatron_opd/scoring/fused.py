"""The teacher's stage beside the student's in one schedule: overlap, prune weights and loss from live logits.

Needs equal layouts. Between two stages travels one tensor, the student's hidden states and behind them the teacher's;
the teacher's columns carry no gradient. On the last stage both models' logits of a row meet inside the loss function,
so nothing but a few numbers per token is stored, and the losses over the full vocabulary become possible. A row holds
whole answers, hence the events of each can be counted there and then; context-parallel ranks, each with a part of every
answer, exchange their numbers of events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config import PruneConfig
from megatron_opd.losses import DistillTargets, candidate_terms, vocab_parallel_logprobs, vocab_parallel_topk
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.exchange import Fields, share_responses
from megatron_opd.prune import from_events
from megatron_opd.scoring.judge import drift_events_of
from megatron_opd.scoring.view import Candidates, teacher_view
from megatron_opd.types import ScoredBatch, TeacherScores


@dataclass(frozen=True)
class Judged:
    """One row on the last stage."""

    targets: DistillTargets  # [T, K] and [T], live logits [T, vocab / tp]
    weight: Tensor  # [T] float32 prune weights, 0 where no response token is predicted


class FusedTeacher:
    """Runs the teacher inside the student's forward steps and judges each row as it comes out."""

    def __init__(self, student: Model, teacher: Model, prune: PruneConfig, candidates: int) -> None:
        self.student, self.teacher, self.prune, self.candidates = student, teacher, prune, candidates
        self.widths = [student.config.hidden_size, teacher.config.hidden_size]
        self.row_multiple = math.lcm(student.row_multiple, teacher.row_multiple)
        self._found: list[tuple[int, Fields]] = []

    def forward(
        self, chunk: torch.nn.Module, tokens: Tensor, row: PackedRow, lengths: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """This stage of both models on one row of T tokens, in the student's schedule.

        Args:
            chunk: the student's stage as the schedule knows it; its input is what the stage before returned here.
            tokens: [T] int64 that this rank holds of a row padded to `row_multiple`.
            row: the student's; `lengths` are those of its sequences, for the teacher's own row.

        Returns:
            What the schedule passes on, [T, 1, both widths], and None; on the last stage the student's logits
            [1, T, vocab / tp] and the teacher's [T, vocab / tp].
        """
        own, beside = self.student.chunks[0], self.teacher.chunks[0]
        if not self.student.layout.is_first_stage:
            mine, theirs = own.decoder.input_tensor.split(self.widths, dim=-1)
            own.set_input_tensor(mine)
            beside.set_input_tensor(theirs.detach())
        with torch.no_grad():
            other = beside(tokens[None], None, None, packed_seq_params=self.teacher.row(lengths, self.row_multiple)[0])
        out = chunk(tokens[None], None, None, packed_seq_params=row)
        if self.student.layout.is_last_stage:
            return out, other[0]
        return torch.cat([out, other], dim=-1), None

    @torch.no_grad()
    def judge(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        sampled: Tensor,
        spans: dict[int, slice],
        predicts: Tensor,
    ) -> Judged:
        """From both models' logits [T, vocab / tp] of a row to what the loss needs; remembers each answer's part.

        Args:
            sampled: [T] int64, the response token that each position predicts.
            spans: this rank's part of each answer's sequence, by the answer's place in the batch.
            predicts: [T] bool, where a response token is predicted.
        """
        shard, prune = self.student.vocab_shard, self.prune
        ids = vocab_parallel_topk(logits, self.candidates, shard)[1]
        own = vocab_parallel_logprobs(logits, ids, shard)
        view = teacher_view(
            teacher_logits, Candidates(ids, sampled), prune, shard.vocab_size, self.student.layout.groups.tp
        )
        view["divergence"] = candidate_terms(own, view["logprobs"]).sum(-1)
        weight = torch.zeros(len(sampled), device=logits.device)
        for i, span in spans.items():
            mask = predicts[span]
            part = {name: column[span] for name, column in view.items()}
            weight[span], events, effective = self._weigh(part, mask)
            del part["logprobs"]  # a table of [T, K] that nobody reads again
            part = {name: column[mask] for name, column in (part | {"weight": weight[span]}).items()}
            self._found.append((i, part | {"events": events, "effective": effective}))
        return Judged(
            DistillTargets(
                student_ids=ids,
                teacher_logprobs=view["logprobs"],
                sampled_ids=sampled,
                teacher_sampled_logprobs=view["sampled_logprobs"],
                teacher_logits=teacher_logits,
            ),
            weight,
        )

    def _weigh(self, part: Fields, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prune weights [T] of this rank's part of one answer's sequence, whose response tokens `mask` [T] names, and
        the whole answer's number of events [1] and effective length [1]."""
        prune, context = self.prune, self.student.layout.groups.cp
        group = context if context.size() > 1 else None
        if prune.signal == "none":
            weight, events, effective = mask.float(), mask.new_zeros(1, dtype=torch.int64), mask.sum()[None]
            if group is not None:
                dist.all_reduce(effective, group=group)
            return weight, events, effective
        score = TeacherScores(part["logprobs"], part["sampled_logprobs"], part["overlap"], part["accepted"])
        result = from_events(drift_events_of([score], mask[None], prune), mask[None], prune.w_drop, prune.w_base, group)
        events = result.total_events
        if group is not None:
            dist.all_reduce(events, group=group)
        return result.loss_weight[0], events, result.effective_length

    def fill(self, batch: ScoredBatch) -> None:
        """After the schedule: every answer's scores and prune weights into `batch`, on every rank. Collective."""
        found, self._found = self._found, []
        answers = [(len(r.prompt.tokens), len(r)) for r in batch.rollouts]
        student = self.student
        parts = share_responses(found, student.layout, student.device, answers, once=("events", "effective"))
        batch.scores = [
            TeacherScores(
                p["overlap"].new_zeros(len(p["overlap"]), 0), p["sampled_logprobs"], p["overlap"], p["accepted"]
            )
            for p in parts
        ]
        batch.prune_weight = [p["weight"] for p in parts]
        batch.effective_length = [int(p["effective"]) for p in parts]
        batch.events = [int(p["events"]) for p in parts]
        batch.reverse_kl = [p["divergence"] for p in parts]
