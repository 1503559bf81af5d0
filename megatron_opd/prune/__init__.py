"""Prune-OPD: overlap of student and teacher, drift events, reliability, response budget; torch only."""

from megatron_opd.losses.topk import vocab_parallel_topk
from megatron_opd.prune.budget import ResponseBudget, StaircaseBudget
from megatron_opd.prune.overlap import count_shared, teacher_top_p_accept, topk_overlap
from megatron_opd.prune.reliability import (
    Reliability,
    ReliabilityState,
    drift_events,
    from_events,
    prefix_event_counts,
    reliability,
)

__all__ = [
    "Reliability",
    "ReliabilityState",
    "ResponseBudget",
    "StaircaseBudget",
    "count_shared",
    "drift_events",
    "from_events",
    "prefix_event_counts",
    "reliability",
    "teacher_top_p_accept",
    "topk_overlap",
    "vocab_parallel_topk",
]
