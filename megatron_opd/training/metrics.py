"""The numbers of one step that follow from its scored batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from megatron_opd.losses import candidate_terms
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, ScoredBatch, TeacherScores


def batch_metrics(batch: ScoredBatch, sampled: int | None = None) -> dict[str, Any]:
    """Means are over all responses of the global batch, or over all of their tokens that the teacher has read.

    `sampled`: tokens that the engine sampled for the batch; None: those that are kept, and no others. Raises
    ValueError where a column of the drift signal would take a number's name.
    """
    rollouts, effective = batch.rollouts, batch.effective_length
    tokens = sum(len(r) for r in rollouts)
    numbers = {
        "tokens_generated": tokens if sampled is None else sampled,
        "tokens_kept": tokens,
        "tokens_scored": sum(s.measured if s.read is None else s.read for s in batch.scores),
        "tokens_scored_prompt": sum(len(r.prompt.teacher_tokens) for r in rollouts),
        "tokens_trained": sum(batch.kept_length),
        "response_length_mean": tokens / len(rollouts),
        "events_mean": sum(batch.events) / len(rollouts),
        "effective_length_mean": sum(effective) / len(effective),
        "effective_length_max": max(effective),
        "ended": {reason: sum(r.end_reason == reason for r in rollouts) for reason in (END_EOS, END_LENGTH, END_DRIFT)},
        "reverse_kl": reverse_kl(batch),
    }
    if batch.token_weight is not None:
        weight = torch.cat(batch.token_weight)
        numbers |= {"token_weight_mean": float(weight.mean()), "tokens_weighted": int((weight > 0).sum())}
    of_signal = signal_metrics(batch)
    if taken := numbers.keys() & of_signal.keys():
        raise ValueError(f"the drift signal's columns need other names: {', '.join(taken)} is a metric already")
    return numbers | of_signal


def memory_gib(device: torch.device) -> float:
    """What this rank has needed since the last call: on a GPU the most that was allocated, on a CPU what the process
    holds now."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = psutil.Process().memory_info().rss
    return round(used / 2**30, 3)


def reverse_kl(batch: ScoredBatch) -> float:
    """Of student to teacher over the candidates, nats, mean over the tokens that the teacher has read."""
    if batch.reverse_kl is not None:
        total = sum(float(d.sum()) for d in batch.reverse_kl)
    else:  # behind `measured` both are the student's: zero
        total = sum(
            float(candidate_terms(r.topk_logprobs, s.logprobs).sum()) for r, s in zip(batch.rollouts, batch.scores)
        )
    return total / sum(s.measured for s in batch.scores)


def teacher_metrics(batch: ScoredBatch, teachers: Teachers, weights: Mapping[str, float]) -> dict[str, Any]:
    """What a step of several teachers looks like to each of them: {"teachers": {name: numbers}}; nothing where there is
    one. `weights`: by which its tokens counted (loss.teacher_shares); 1 where it has none."""
    if len(teachers.models) == 1:
        return {}
    numbers = {}
    for name, members in teachers.members(batch.rollouts).items():
        rollouts, scores = [batch.rollouts[i] for i in members], [batch.scores[i] for i in members]
        read = sum(s.measured for s in scores)
        total = sum(float(candidate_terms(r.topk_logprobs, s.logprobs).sum()) for r, s in zip(rollouts, scores))
        numbers[name] = {
            "responses": len(members),
            "tokens": sum(len(r) for r in rollouts),
            "response_length_mean": sum(len(r) for r in rollouts) / len(members),
            "effective_length_mean": sum(batch.effective_length[i] for i in members) / len(members),
            "drifted": sum(batch.events[i] > 0 for i in members) / len(members),
            "reverse_kl": total / read if read else None,
            "overlap_mean": column_mean(scores, "overlap"),
            "weight": weights.get(name, 1.0),
            "swap_s": teachers.models[name].take_moved_seconds(),
        }
    return {"teachers": numbers}


def signal_metrics(batch: ScoredBatch) -> dict[str, float | None]:
    """The mean of each of the drift signal's columns; overlap_mean is None where the signal is another one."""
    means: dict[str, float | None] = {"overlap_mean": None}
    for name in batch.scores[0].columns:
        means[f"{name}_mean"] = column_mean(batch.scores, name)
    return means


def column_mean(scores: Sequence[TeacherScores], name: str) -> float | None:
    """Over the tokens at which the signal has the column's value; None where it has none."""
    values = [s.columns[name].float() for s in scores if name in s.columns]
    mean = float(torch.cat(values).nanmean()) if values else math.nan
    return None if math.isnan(mean) else mean
