"""Picks the way of scoring that the config names."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.rollout.base import RolloutEngine
from megatron_opd.scoring.base import Scoring
from megatron_opd.scoring.fused import FusedScoring
from megatron_opd.scoring.in_flight import InFlightScoring
from megatron_opd.scoring.separate import SeparateScoring
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.scoring.until_spent import UntilSpentScoring


def make_scoring(config: Config, engine: RolloutEngine, teachers: Teachers) -> Scoring:
    """The only place that chooses; the config has refused what does not go together."""
    return scoring_class(config)(config, engine, teachers)


def scoring_class(config: Config) -> type[Scoring]:
    prune = config.prune
    if config.score.mode == "fused":
        return FusedScoring
    if prune.in_flight:
        return InFlightScoring
    if prune.cut == "reliability" and prune.w_drop > 0:
        return UntilSpentScoring
    return SeparateScoring
