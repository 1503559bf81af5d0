"""Where in the responses the models part: one line a step in RUN/positions.jsonl, of bins of response positions."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_opd.prune.signals import DriftSignal
from megatron_opd.scoring.prune_weights import drift_events_of
from megatron_opd.types import ScoredBatch

BINS = 48


def position_profile(batch: ScoredBatch, signal: DriftSignal, longest: int) -> dict[str, Any]:
    """Counts and means over the batch's tokens that the teacher has read, by position from 0 to `longest`.

    Returns:
        `width`, tokens of a bin; and of each bin `tokens`, drift `events`, responses whose reliability was `spent`
        there, and the mean `overlap` (None where the signal is another one, or nothing was read).
    """
    width = math.ceil(longest / BINS)
    bins = math.ceil(longest / width)
    tokens, events, overlap = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))
    spent = torch.zeros(bins, dtype=torch.float64)
    has_overlap = bool(batch.scores) and "overlap" in batch.scores[0].columns
    for i, scores in enumerate(batch.scores):
        n = scores.measured
        where = (torch.arange(n) // width).clamp(max=bins - 1)
        tokens.index_add_(0, where, torch.ones(n, dtype=torch.float64))
        events.index_add_(0, where, drift_events_of(scores, signal)[:n].double())
        if has_overlap:
            overlap.index_add_(0, where, scores.columns["overlap"].double().nan_to_num())
        if batch.effective_length[i] < len(batch.rollouts[i]):
            spent[min(batch.effective_length[i] // width, bins - 1)] += 1
    last = int(tokens.nonzero().max()) + 1 if tokens.any() else 0
    means = [round(float(o / t), 4) if t else None for o, t in zip(overlap, tokens)] if has_overlap else [None] * bins
    return {
        "width": width,
        "tokens": [int(n) for n in tokens[:last]],
        "events": [int(n) for n in events[:last]],
        "spent": [int(n) for n in spent[:last]],
        "overlap": means[:last],
    }
