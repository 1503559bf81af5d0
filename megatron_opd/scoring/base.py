"""One way of getting a step's responses and the teacher's scores of them; scoring/factory.py picks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Protocol

from megatron_opd.config import Config
from megatron_opd.plugins import is_own
from megatron_opd.prune.signals import make_signal
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Watch
from megatron_opd.rollout.checks import check_rollouts
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Rollout, TeacherScores


class Clock(Protocol):
    """Books the seconds inside the context on a phase of the step."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...


class Scoring(ABC):
    """Has the engine generate and the teacher read what it generated.

    `candidates` is how many of the student's most likely tokens the engine must return at each position.
    """

    def __init__(self, config: Config, engine: RolloutEngine, teachers: Teachers) -> None:
        self.config, self.engine, self.teachers = config, engine, teachers
        self.signal = make_signal(config.prune)
        self.candidates = config.kept_candidates
        self.sends_hidden = config.score.payload == "hidden"

    @abstractmethod
    def generate_and_score(
        self, requests: list[Request], sampling: Sampling, clock: Clock
    ) -> tuple[list[Rollout], list[TeacherScores]]:
        """One step's responses and their scores, both in the order of the requests.

        Collective, the same result on every rank. The scores are empty where the training pass makes them.
        """

    def _generate(self, requests: list[Request], sampling: Sampling, watch: Watch | None = None) -> list[Rollout]:
        """The engine is awake for as long as it generates: the memory that it frees asleep is the other passes'."""
        self.engine.wake()
        if watch is None:
            rollouts = self.engine.generate(requests, sampling)
        else:
            rollouts = self.engine.generate(requests, sampling, watch, self.config.prune.segment)
        self.engine.sleep()
        if is_own(self.config.rollout.engine):
            check_rollouts(rollouts, requests, sampling, self.teachers.default.vocab_size)
        return rollouts
