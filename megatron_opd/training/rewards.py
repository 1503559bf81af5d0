"""Rewards of the verifier for responses that were generated past their drift point (prune.after_drift: grpo)."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.evaluation.verifiers import Case, VerifierPool, response_text
from megatron_opd.parallel.collective import on_rank_0
from megatron_opd.rollout.base import Request
from megatron_opd.scoring.in_flight import generated_past_drift
from megatron_opd.scoring.prune_weights import add_rewards
from megatron_opd.types import Rollout, ScoredBatch


class PastDriftRewards:
    """Rank 0 has the verifier's processes, from the first reward on; every rank gets the rewards."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.verifiers: VerifierPool | None = None

    def add_to(self, batch: ScoredBatch, requests: list[Request]) -> None:
        """Past their drift point the responses learn from their rewards. Collective."""
        members = generated_past_drift(requests, self.config)
        rewards = on_rank_0(lambda: self._verify(batch.rollouts, sorted(members)))
        copies = self.config.train.responses_per_prompt
        add_rewards(batch, rewards, members, copies, self.config.prune.grpo_coefficient)

    def _verify(self, rollouts: list[Rollout], indices: list[int]) -> list[float]:
        """1 for the responses at `indices` that the verifier accepts, else 0."""
        if self.verifiers is None:
            settings = self.config.eval
            self.verifiers = VerifierPool(
                self.config.data.verifier, settings.verifier_timeout_s, settings.verifier_workers
            )
        rewards = [0.0] * len(rollouts)
        for i, verdict in zip(indices, self.verifiers.score([self._case(rollouts[i]) for i in indices])):
            rewards[i] = float(verdict.correct)
        return rewards

    def _case(self, rollout: Rollout) -> Case:
        return Case.of(rollout.prompt, response_text(rollout, self.tokenizer))

    def close(self) -> None:
        if self.verifiers is not None:
            self.verifiers.close()
