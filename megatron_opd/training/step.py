"""The student's forward and backward over one scored batch, and the update.

`objective.py` has what is trained on. The loss is divided by the response tokens of the global batch, so the gradient
is the same under every layout and every split into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_opd.compat.gpt_model import run_chunk
from megatron_opd.config import Config
from megatron_opd.models.head_shard import head_shard
from megatron_opd.models.headless import head_parameter, without_head
from megatron_opd.models.model import Model
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.scoring.fused import FusedTeacher
from megatron_opd.training.microbatch import MicroBatch, build_microbatch, plan_training
from megatron_opd.training.objective import Objective, Sums, build_loss, measures_gap, over_ranks
from megatron_opd.training.setup import Trainer
from megatron_opd.types import ScoredBatch


@dataclass
class StepResult:
    """What one optimizer step did. Identical on every rank."""

    loss: float
    grad_norm: float
    applied: bool  # False: loss or gradients were not finite, or a spike; the parameters are unchanged
    reason: str  # why it was not applied
    lr: float  # that the step was trained with, or would have been
    microbatches: int  # of this rank's pipeline
    gap_mean: float | None  # |rollout - student| log-prob on sampled tokens, nats; None where not measured
    gap_max: float | None
    gap_count: int  # tokens above rollout.gap_threshold
    mismatch: float | None  # KL of sampler to trainer, estimated on sampled tokens, nats
    importance_mean: float | None  # mean of r, the trainer's over the sampler's probability of a sampled token
    importance_ess: float | None  # (sum of r)^2 / (tokens x sum of r^2): 1 where all are alike

    def metrics(self) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "microbatches": self.microbatches,
        }
        if self.gap_mean is not None:
            numbers |= {
                "rollout_logprob_gap_mean": self.gap_mean,
                "rollout_logprob_gap_max": self.gap_max,
                "rollout_logprob_gap_count": self.gap_count,
                "rollout_mismatch": self.mismatch,
                "importance_mean": self.importance_mean,
                "importance_ess": self.importance_ess,
            }
        return numbers if self.applied else numbers | {"skipped": self.reason}


class TrainingStep:
    """Forward, backward and update; remembers gradient norms to recognise a spike."""

    def __init__(self, trainer: Trainer, config: Config) -> None:
        self.trainer, self.config = trainer, config
        self.loss = build_loss(config)
        fused = config.score.mode == "fused"
        self.fused = FusedTeacher(trainer.student, trainer.teacher, config.prune, config.candidates) if fused else None
        rebuilds = config.score.payload == "hidden"
        self.teacher_head = head_shard(trainer.teacher, trainer.student) if rebuilds else None
        self.norms: list[float] = []

    def __call__(self, batch: ScoredBatch) -> StepResult:
        trainer = self.trainer
        for chunk in trainer.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        sums, microbatches = self._forward_backward(batch)
        trainer.optimizer.prepare_grads()
        norm = float(trainer.optimizer.get_grad_norm())
        lr = trainer.learning_rate
        reason = self._refuse(sums.loss, norm)
        if not reason:
            trainer.optimizer.step()
            trainer.scheduler.step(increment=1)
            self.norms = [*self.norms[-99:], norm]
        measured = measures_gap(self.config) and sums.gap_tokens > 0
        return StepResult(
            sums.loss,
            norm,
            applied=not reason,
            reason=reason,
            lr=lr,
            microbatches=microbatches,
            gap_mean=sums.gap / sums.gap_tokens if measured else None,
            gap_max=sums.gap_max if measured else None,
            gap_count=int(sums.gap_above),
            mismatch=sums.mismatch / sums.gap_tokens if measured else None,
            importance_mean=sums.ratio / sums.gap_tokens if measured else None,
            importance_ess=effective_share(sums) if measured else None,
        )

    def _forward_backward(self, batch: ScoredBatch) -> tuple[Sums[float], int]:
        """Gradients into the buffers, and over all ranks the step's sums; this rank's number of micro-batches."""
        student, fused, settings = self.trainer.student, self.fused, self.config
        multiple = fused.row_multiple if fused else 1
        plan = plan_training(student, batch, settings.train.tokens_per_microbatch)
        micros = [build_microbatch(student, batch, members, multiple) for members in plan]
        objective = Objective(self.loss, settings, student.vocab_shard, batch.response_tokens, self.teacher_head)
        resident = self.trainer.teacher.resident() if fused else nullcontext()
        with resident, without_head(student) if settings.loss.fused_head else nullcontext():
            parts = run_schedule(
                ForwardStep(student, objective, settings.loss.fused_head, fused),
                self.trainer.ddp,
                student.config,
                student.layout,
                micros,
                [sum(micro.row.lengths) for micro in micros],
                width=sum(fused.widths) if fused else None,
            )
        if fused:
            fused.fill(batch)
        return over_ranks(parts if student.layout.owns_results else [], student.device), len(micros)

    def _refuse(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        factor = self.config.train.spike_factor
        if factor and len(self.norms) >= 10 and norm > factor * median(self.norms):
            return f"gradient norm {norm:.4g} exceeds {factor} x the running median {median(self.norms):.4g}"
        return ""


def effective_share(sums: Sums[float]) -> float:
    """Effective sample size of the importance weights as a share of their number: 1 where all are alike."""
    return sums.ratio**2 / (sums.gap_tokens * sums.ratio_squared)


@dataclass(frozen=True)
class ForwardStep:
    """Megatron-Core's forward step function: (iterator, model chunk) -> (output, function from output to loss)."""

    student: Model
    objective: Objective
    fused_head: bool
    fused: FusedTeacher | None

    def __call__(
        self, micros: Iterator[MicroBatch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Sums[Tensor]]]]:
        micro = next(micros)
        if self.fused is None:
            output = run_chunk(chunk, micro.tokens, micro.row)
            return output, partial(self.loss, micro, None)
        output, teacher_logits = self.fused.forward(chunk, micro.tokens, micro.row, micro.lengths)
        return output, partial(self.loss, micro, teacher_logits)

    def loss(
        self, micro: MicroBatch, teacher_logits: Tensor | None, output: Tensor
    ) -> tuple[Tensor, Tensor, Sums[Tensor]]:
        """The last stage's output [1, T, ...] -> loss, a token count of zero (it is divided already), the sums."""
        if self.fused_head:
            head, split = head_parameter(self.student), self.student.config.sequence_parallel
            loss, sums = self.objective.of_hidden(output[0], head, micro, split)
        else:
            if self.fused is not None and teacher_logits is not None:
                scored = self.fused.score(
                    output[0].detach(), teacher_logits, micro.sampled, micro.spans, micro.predicts
                )
                micro = replace(micro, weight=scored.weight, targets=scored.targets)
            loss, sums = self.objective.of_logits(output[0], micro)
        return loss, torch.zeros((), dtype=torch.int, device=output.device), sums
