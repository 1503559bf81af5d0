"""The teacher's stage beside the student's in one schedule: overlap, prune weights and loss from live logits.

Needs equal layouts. Between two stages travels one tensor, the student's hidden states and behind them the teacher's;
the teacher's columns carry no gradient. On the last stage both models' logits of a row meet inside the loss function,
so nothing but a few numbers per token is stored, and the losses over the full vocabulary become possible. A row holds
whole responses, hence the events of each can be counted there and then; context-parallel ranks, each with a part of
every response, exchange their numbers of events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.compat.gpt_model import given_input, run_chunk, set_input
from megatron_opd.config import PruneConfig
from megatron_opd.losses import DistillTargets, candidate_terms, vocab_parallel_logprobs, vocab_parallel_topk
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRow
from megatron_opd.parallel.exchange import Fields, share_responses
from megatron_opd.prune.signals import make_signal
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.scoring.base import Clock, Scoring
from megatron_opd.scoring.prune_weights import weigh
from megatron_opd.scoring.teacher_view import Candidates, columns_of, own_columns, teacher_view
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores


class FusedScoring(Scoring):
    """Generates alone: the scores, and the prune weights with them, are made in the training pass by `FusedTeacher`."""

    def generate_and_score(
        self, requests: list[Request], sampling: Sampling, clock: Clock
    ) -> tuple[list[Rollout], list[TeacherScores]]:
        with clock.phase("rollout"):
            return self._generate(requests, sampling), []


@dataclass(frozen=True)
class ScoredMicroBatch:
    """What the loss needs of one row, on the last stage."""

    targets: DistillTargets  # [T, K] and [T], live logits [T, vocab / tp]
    weight: Tensor  # [T] float32 prune weights, 0 where no response token is predicted


class FusedTeacher:
    """Runs the teacher inside the student's forward steps and scores each row as it comes out."""

    def __init__(self, student: Model, teacher: Model, prune: PruneConfig, candidates: int) -> None:
        self.student, self.teacher, self.prune, self.candidates = student, teacher, prune, candidates
        self.signal = make_signal(prune)
        self.widths = [student.config.hidden_size, teacher.config.hidden_size]
        self.row_multiple = math.lcm(student.row_multiple, teacher.row_multiple)
        self._scored: list[tuple[int, Fields]] = []  # index of a response, this rank's part of its scores

    def forward(
        self, chunk: torch.nn.Module, tokens: Tensor, packed: PackedRow, lengths: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """This stage of both models on one row of T tokens, in the student's schedule.

        Args:
            chunk: the student's stage as the schedule knows it; its input is what the stage before returned here.
            tokens: [T] int64 that this rank holds of a row padded to `row_multiple`.
            packed: the student's row; `lengths` are those of its sequences, for the teacher's own row.

        Returns:
            What the schedule passes on, [T, 1, both widths], and None; on the last stage the student's logits
            [1, T, vocab / tp] and the teacher's [T, vocab / tp].
        """
        own, beside = self.student.chunks[0], self.teacher.chunks[0]
        if not self.student.layout.is_first_stage:
            mine, theirs = given_input(own).split(self.widths, dim=-1)
            set_input(own, mine)
            set_input(beside, theirs.detach())
        with torch.no_grad():
            other = run_chunk(beside, tokens, self.teacher.row(lengths, self.row_multiple)[0])
        out = run_chunk(chunk, tokens, packed)
        if self.student.layout.is_last_stage:
            return out, other[0]
        return torch.cat([out, other], dim=-1), None

    @torch.no_grad()
    def score(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        sampled: Tensor,
        spans: dict[int, slice],
        predicts: Tensor,
    ) -> ScoredMicroBatch:
        """From both models' logits [T, vocab / tp] of a row to what the loss needs; remembers each response's part.

        Args:
            sampled: [T] int64, the response token that each position predicts.
            spans: this rank's part of each response's sequence, by the response's index in the batch.
            predicts: [T] bool, where a response token is predicted.
        """
        shard = self.student.vocab_shard
        ids = vocab_parallel_topk(logits, self.candidates, shard)[1]
        own = vocab_parallel_logprobs(logits, ids, shard)
        view = teacher_view(teacher_logits, Candidates(ids, own, sampled), self.signal, self.teacher)
        view["reverse_kl"] = candidate_terms(own, view["logprobs"]).sum(-1)
        weight = torch.zeros(len(sampled), device=logits.device)
        for index, span in spans.items():
            mask = predicts[span]
            part = {name: column[span] for name, column in view.items()}
            weight[span], events, effective = self._weigh(part, mask)
            del part["logprobs"]  # a table of [T, K] that nobody reads again
            part = {name: column[mask] for name, column in (part | {"weight": weight[span]}).items()}
            self._scored.append((index, part | {"events": events, "effective": effective}))
        return ScoredMicroBatch(
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
        """Prune weights [T] of this rank's part of one response's sequence, whose response tokens `mask` [T] names, and
        the whole response's number of events [1] and effective length [1]."""
        context = self.student.layout.groups.cp
        group = context if context.size() > 1 else None
        events = self.signal.response_events(columns_of(part), len(mask))
        result = weigh(events[None], mask[None], self.prune, group)
        total = result.total_events
        if group is not None:
            dist.all_reduce(total, group=group)
        return result.loss_weight[0], total, result.effective_length

    def fill(self, batch: ScoredBatch) -> None:
        """After the schedule: every response's scores and prune weights into `batch`, on every rank. Collective."""
        scored, self._scored = self._scored, []
        lengths = [(len(r.prompt.tokens), len(r)) for r in batch.rollouts]
        student = self.student
        parts = share_responses(scored, student.layout, student.device, lengths, once=("events", "effective"))
        batch.scores = [
            TeacherScores(torch.zeros(len(r), 0), p["sampled_logprobs"], own_columns(p), len(r))
            for r, p in zip(batch.rollouts, parts)
        ]
        batch.prune_weight = [p["weight"] for p in parts]
        batch.effective_length = [int(p["effective"]) for p in parts]
        batch.events = [int(p["events"]) for p in parts]
        batch.reverse_kl = [p["reverse_kl"] for p in parts]
