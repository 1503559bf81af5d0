"""A drift signal: an event where the student takes a token that the teacher finds far less likely than its best one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from megatron_opd.losses import vocab_parallel_logprobs, vocab_parallel_topk
from megatron_opd.prune.signals import DriftSignal, PruneSettings, TeacherReading


class FarFromBest(DriftSignal):
    def __init__(self, prune: PruneSettings, ratio: float = 0.05) -> None:  # prune.signal_options: {ratio: 0.1}
        super().__init__(prune)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio {ratio} must lie in (0, 1]")
        self.bound = math.log(ratio)

    def measure(self, reading: TeacherReading) -> dict[str, Tensor]:
        """What is kept of the teacher's logits: one number a token. They are shards; these functions know it."""
        best = vocab_parallel_topk(reading.logits, 1, reading.shard)[1]
        logprob = vocab_parallel_logprobs(reading.logits, best, reading.shard)[:, 0]
        return {"below_best": reading.sampled_logprobs - logprob}

    def events(self, columns: Mapping[str, Tensor]) -> Tensor:
        return ~(columns["below_best"] >= self.bound)  # so that NaN, from a broken teacher, is an event
