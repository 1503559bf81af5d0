"""After every hand-over: does the engine hold the trainer's parameters, and is the teacher still the teacher?"""

from __future__ import annotations

import torch

from megatron_opd.config import Config
from megatron_opd.errors import RunError
from megatron_opd.rollout.base import RolloutEngine
from megatron_opd.rollout.reference import own_logprobs
from megatron_opd.training.setup import Trainer

PROBE_TOKENS = 32


class HandoverError(RunError):
    """The engine or the teacher runs other parameters than it should; going on would train on noise."""


class HandoverProbe:
    """Compares log-probs on a fixed random prompt. Collective, the same result on every rank.

    Only for engines that hold parameters of their own; the Megatron engine samples from the trainer's.
    """

    def __init__(self, config: Config, trainer: Trainer, engine: RolloutEngine) -> None:
        self.tolerance = config.rollout.tolerance(config.student.precision)
        self.trainer, self.engine = trainer, engine
        generator = torch.Generator().manual_seed(config.train.seed)
        self.tokens = torch.randint(trainer.student.vocab_size, (PROBE_TOKENS,), generator=generator).tolist()
        self.teachers = self._teacher_logprobs()

    def __call__(self) -> dict[str, float]:
        """The largest gaps in nats: engine to trainer, and teacher to itself at the start.

        Raises HandoverError where one exceeds rollout.sync_tolerance.
        """
        own = own_logprobs(self.trainer.student, self.tokens)
        gap = float((self.engine.probe(self.tokens) - own).abs().max())
        if not gap <= self.tolerance:
            raise HandoverError(
                f"after the hand-over the engine's log-probs differ from the trainer's by {gap:.4g} nats "
                f"(rollout.sync_tolerance: {self.tolerance}): the engine holds other parameters, version "
                f"{self.engine.policy_version}"
            )
        drift = 0.0
        for name, now in self._teacher_logprobs().items():
            moved = float((now - self.teachers[name]).abs().max())
            if not moved <= self.tolerance:
                raise HandoverError(
                    f"the log-probs of {self.trainer.teachers[name].name} moved by {moved:.4g} nats since the start "
                    f"(rollout.sync_tolerance: {self.tolerance}): its parameters were overwritten"
                )
            drift = max(drift, moved)
        return {"sync_logprob_gap": gap, "teacher_logprob_gap": drift}

    def _teacher_logprobs(self) -> dict[str, torch.Tensor]:
        logprobs = {}
        for name, teacher in self.trainer.teachers.items():
            with teacher.resident():
                logprobs[name] = own_logprobs(teacher, self.tokens)
        return logprobs
