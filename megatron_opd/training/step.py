"""The student's forward and backward over one scored batch, and the update.

The loss is the sum over kept response positions of prune weight times distillation loss, divided by the response
tokens of the global batch: the same gradient under every layout and every split into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config import Config
from megatron_opd.losses import get_loss, head_loss, student_logprobs, vocab_parallel_logprobs
from megatron_opd.models.headless import head_weight, without_head
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.scoring.fused import FusedTeacher
from megatron_opd.training.microbatch import MicroBatch, build_microbatch, plan_training
from megatron_opd.training.setup import Trainer
from megatron_opd.types import ScoredBatch


@dataclass
class StepResult:
    """What one optimizer step did. Identical on every rank."""

    loss: float
    grad_norm: float
    applied: bool  # False: loss or gradients were not finite, or a spike; the parameters are unchanged
    reason: str  # why it was not applied
    microbatches: int  # of this rank's pipeline
    gap_mean: float | None  # |rollout - student| log-prob on sampled tokens, nats; None where not measured
    gap_max: float | None
    gap_count: int  # tokens above rollout.gap_threshold


class TrainingStep:
    """Forward, backward and update; remembers gradient norms to recognise a spike."""

    def __init__(self, trainer: Trainer, config: Config) -> None:
        self.trainer, self.config = trainer, config
        self.loss = get_loss(config.loss.kind)
        fused = config.score.mode == "fused"
        self.fused = FusedTeacher(trainer.student, trainer.teacher, config.prune, config.candidates) if fused else None
        self.measure_gap = config.rollout.engine != "megatron" or config.rollout.importance_clip is not None
        self.norms: list[float] = []

    def __call__(self, batch: ScoredBatch) -> StepResult:
        trainer = self.trainer
        for chunk in trainer.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        plan = plan_training(trainer.student, batch, self.config.train.tokens_per_microbatch)
        sums = self._forward_backward(batch, plan)
        loss, gap_sum, gap_count, gap_tokens, gap_max = sums
        trainer.optimizer.prepare_grads()
        norm = float(trainer.optimizer.get_grad_norm())
        reason = self._refuse(loss, norm)
        if not reason:
            trainer.optimizer.step()
            trainer.scheduler.step(increment=1)
            self.norms = [*self.norms[-99:], norm]
        measured = self.measure_gap and gap_tokens > 0
        return StepResult(
            loss,
            norm,
            not reason,
            reason,
            len(plan),
            gap_sum / gap_tokens if measured else None,
            gap_max if measured else None,
            int(gap_count),
        )

    def _forward_backward(self, batch: ScoredBatch, plan: tuple[tuple[int, ...], ...]) -> list[float]:
        student, config = self.trainer.student, self.config
        fused = self.fused
        multiple = fused.row_multiple if fused else 1
        built = [build_microbatch(student, batch, members, config.loss.jsd_beta, multiple) for members in plan]
        resident = self.trainer.teacher.resident() if fused else nullcontext()
        with resident, without_head(student) if config.loss.fused_head else nullcontext():
            collected = run_schedule(
                lambda iterator, chunk: self._forward(iterator, chunk, batch.response_tokens),
                self.trainer.ddp,
                student.config,
                student.layout,
                built,
                [sum(micro.row.lengths) for micro in built],
                width=sum(fused.widths) if fused else None,
            )
        if fused:
            fused.fill(batch)
        sums = torch.zeros(4, dtype=torch.float64, device=student.device)
        peak = torch.zeros(1, dtype=torch.float64, device=student.device)
        if student.layout.owns_results:
            for part in collected:
                sums += part[:4]
                peak = torch.maximum(peak, part[4:])
        dist.all_reduce(sums)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return [*sums.tolist(), *peak.tolist()]

    def _forward(self, iterator: Iterator[MicroBatch], chunk: torch.nn.Module, denominator: int):
        micro, teacher_logits = next(iterator), None
        if self.fused:
            out, teacher_logits = self.fused.forward(chunk, micro.tokens, micro.row, micro.lengths)
        else:
            out = chunk(micro.tokens[None], None, None, packed_seq_params=micro.row)
        return out, lambda output: self._loss(output[0], micro, denominator, teacher_logits)

    def _loss(
        self, output: Tensor, micro: MicroBatch, denominator: int, teacher_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model's output [T, ...] -> loss, a token count of zero (the division is done here), the step's sums."""
        part = torch.zeros(5, dtype=torch.float64, device=output.device)
        if self.config.loss.fused_head:
            total = self._loss_of_hidden(output, micro, part)
        else:
            total = self._loss_of_logits(output, micro, part, teacher_logits)
        loss = total / denominator
        part[0] = loss.detach().double()
        return loss, torch.zeros((), dtype=torch.int, device=output.device), part

    def _loss_of_logits(self, logits: Tensor, micro: MicroBatch, part: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """logits [T, vocab / tp] -> the loss, summed over the row."""
        student, group = self.trainer.student, self.trainer.student.layout.groups.tp
        weight, targets = micro.weight, micro.targets
        if teacher_logits is not None:
            assert self.fused is not None
            sampled, beta = targets.sampled_ids, self.config.loss.jsd_beta
            judged = self.fused.judge(logits.detach(), teacher_logits, sampled, micro.spans, micro.predicts, beta)
            weight, targets = judged.weight, judged.targets
        if self.measure_gap:
            sampled = targets.sampled_ids[:, None]
            own = vocab_parallel_logprobs(logits.detach(), sampled, group, student.vocab_size)[:, 0]
            self._measure(own, micro, part)
            if self.config.rollout.importance_clip is not None:
                weight = weight * self._importance(own, micro, slice(None))
        total = self.loss(
            logits,
            targets.first(self.config.loss_k),
            weight,
            group,
            vocab_size=student.vocab_size,
            chunk_tokens=self.config.loss.chunk_tokens,
            inplace_backward=micro.advantage is None,
        )
        if micro.advantage is not None:
            own = student_logprobs(
                logits,
                targets.sampled_ids[:, None],
                group,
                vocab_size=student.vocab_size,
                chunk_tokens=self.config.loss.chunk_tokens,
            )
            total = total - (micro.advantage * own[:, 0]).sum()
        return total

    def _loss_of_hidden(self, hidden: Tensor, micro: MicroBatch, part: Tensor) -> Tensor:
        """hidden [T, hidden size], T / tp with sequence parallelism -> the loss, summed over the row."""
        student, config = self.trainer.student, self.config
        clipped = config.rollout.importance_clip is not None
        total, own = head_loss(
            config.loss.kind,
            hidden,
            head_weight(student),
            micro.targets.first(config.loss_k),
            micro.weight,
            student.layout.groups.tp,
            vocab_size=student.vocab_size,
            sequence_parallel=student.config.sequence_parallel,
            chunk_tokens=config.loss.chunk_tokens,
            advantage=micro.advantage,
            reweigh=(lambda own, rows: self._importance(own, micro, rows)) if clipped else None,
        )
        if self.measure_gap:
            self._measure(own, micro, part)
        return total

    def _measure(self, own: Tensor, micro: MicroBatch, part: Tensor) -> None:
        """Into `part`: how far the student's log-probs of the sampled tokens, `own` [T], are from the sampler's."""
        gap = (own - micro.rollout_logprobs)[micro.predicts].abs()
        part[1], part[3] = gap.sum(), gap.numel()
        part[2] = (gap > self.config.rollout.gap_threshold).sum()
        part[4] = gap.max() if gap.numel() else 0.0

    def _importance(self, own: Tensor, micro: MicroBatch, rows: slice) -> Tensor:
        """Truncated importance weights, trainer over sampler, of these rows; 1 where no response token is predicted."""
        ratio = (own - micro.rollout_logprobs[rows]).exp().clamp(max=self.config.rollout.importance_clip)
        return torch.where(micro.predicts[rows], ratio, 1.0)

    def _refuse(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        factor = self.config.train.spike_factor
        if factor and len(self.norms) >= 10 and norm > factor * median(self.norms):
            return f"gradient norm {norm:.4g} exceeds {factor} x the running median {median(self.norms):.4g}"
        return ""
