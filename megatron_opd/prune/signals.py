"""Drift signals: what makes a response position a drift event. One class each; `prune.signal` names it.

A signal says what it takes from the teacher's logits (`measure`) and which positions are events (`events`). The rule
for positions that nobody measured is the same for all: see `DriftSignal.response_events`.

Your own is a subclass of `DriftSignal` in a module of your own, `prune.signal: mymodule:MySignal`; it is built with the
config's prune section and, by keyword, with `prune.signal_options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opd.errors import ConfigError
from megatron_opd.losses import VocabShard
from megatron_opd.plugins import SIGNALS, build_part
from megatron_opd.prune.overlap import count_shared, teacher_top_p_accept


class PruneSettings(Protocol):
    """What signals read of the config's prune section."""

    signal: str
    signal_options: dict[str, Any]
    k: int
    threshold: float
    teacher_top_p: float


@dataclass(frozen=True)
class TeacherReading:
    """R response positions on the teacher's last pipeline stage, the only place where its logits exist.

    Everything but `logits` is the same on all tensor-parallel ranks. With score.mode: fused the positions of a whole
    row are here; those that predict no response token are not asked for events.
    """

    logits: Tensor  # [R, vocab / tp], this rank's shard of the teacher's logits, padding ids included
    student_ids: Tensor  # [R, K] int64, the student's K most likely tokens, descending
    student_logprobs: Tensor  # [R, K] float32, the student's log-probs of them
    sampled_ids: Tensor  # [R] int64, the response's own tokens
    logprobs: Tensor  # [R, K] float32, the teacher's log-probs at student_ids, over the full vocabulary
    sampled_logprobs: Tensor  # [R] float32, the teacher's at the sampled tokens
    shard: VocabShard  # which part of the vocabulary the logits cover; has the collectives over the parts


class DriftSignal(ABC):
    """Base of all signals. It holds settings alone: every rank and every way of scoring builds its own."""

    def __init__(self, prune: PruneSettings) -> None:
        self.prune = prune

    def measure(self, reading: TeacherReading) -> dict[str, Tensor]:
        """What is kept of the logits: columns [R, ...] by name, the same on every tensor-parallel rank.

        They travel to every rank, so keep few numbers a position. The mean of each becomes a metric, NAME_mean.
        Without an override nothing is kept beside the log-probs that every signal has.
        """
        return {}

    @abstractmethod
    def events(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Which of M measured positions are drift events: [M] bool.

        `columns` are this signal's own and the teacher's "logprobs" [M, K] and "sampled_logprobs" [M]. Write the test
        so that NaN, which comes from a broken teacher alone, is an event: `~(value >= bound)`, not `value < bound`.
        """

    def response_events(self, columns: Mapping[str, Tensor], length: int) -> Tensor:
        """[length] bool: drift events of a response whose first M <= length positions were measured.

        A position that nobody measured is no event. The teacher stops reading where reliability is spent, and nothing
        behind that point could lower it further. Raises TypeError where `events` returns something else than [M] bool.
        """
        events, measured = self.events(columns), columns["sampled_logprobs"]
        if events.dtype != torch.bool or events.shape != measured.shape:
            raise TypeError(
                f"{type(self).__name__}.events returned {events.dtype} {list(events.shape)}, not bool "
                f"{list(measured.shape)}"
            )
        return torch.nn.functional.pad(events, (0, length - len(events)))


class TopKOverlap(DriftSignal):
    """An event where fewer than `threshold` of the student's k most likely tokens are among the teacher's k."""

    def measure(self, reading: TeacherReading) -> dict[str, Tensor]:
        k = self.prune.k
        return {"overlap": count_shared(reading.logits, reading.student_ids[:, :k], k, reading.shard) / k}

    def events(self, columns: Mapping[str, Tensor]) -> Tensor:
        return ~(columns["overlap"] >= self.prune.threshold)


class TeacherNucleus(DriftSignal):
    """An event where the sampled token lies outside the teacher's nucleus of mass `teacher_top_p` within its top k."""

    def measure(self, reading: TeacherReading) -> dict[str, Tensor]:
        k, p = self.prune.k, self.prune.teacher_top_p
        return {"accepted": teacher_top_p_accept(reading.logits, reading.sampled_ids, k, p, reading.shard)}

    def events(self, columns: Mapping[str, Tensor]) -> Tensor:
        return ~columns["accepted"]


class NoSignal(DriftSignal):
    """Nothing is an event: plain on-policy distillation."""

    def events(self, columns: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(columns["sampled_logprobs"], dtype=torch.bool)


def make_signal(prune: PruneSettings) -> DriftSignal:
    """The signal that `prune.signal` names. Raises ConfigError where it cannot be imported or built."""
    signal = build_part("prune.signal", prune.signal, SIGNALS, (prune,), prune.signal_options)
    if not isinstance(signal, DriftSignal):
        raise ConfigError(f"prune.signal: {prune.signal} is no subclass of megatron_opd.prune.signals.DriftSignal")
    return signal
