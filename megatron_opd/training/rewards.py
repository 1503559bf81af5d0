"""Rewards of the verifier for responses that were generated past their drift point (prune.after_drift: grpo)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_opd.config import Config, ConfigError
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.evaluation.verifiers import (
    Case,
    Verdict,
    VerifierError,
    VerifierPool,
    reference_verdicts,
    response_text,
)
from megatron_opd.parallel.collective import on_rank_0
from megatron_opd.rollout.base import Request
from megatron_opd.scoring.in_flight import generated_past_drift
from megatron_opd.scoring.prune_weights import add_rewards
from megatron_opd.types import Prompt, Rollout, ScoredBatch

TRIED = 8  # reference answers that the verifier is shown before the run
PATIENCE = 20  # steps in a row without an effective reward after which the run says so


class PastDriftRewards:
    """Rank 0 has the verifier's processes; every rank gets the rewards. What they teach is watched: one warning."""

    def __init__(self, config: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        self.config, self.tokenizer, self.say = config, tokenizer, say
        settings = config.eval
        self.verifiers = VerifierPool(config.data.verifier, settings.verifier_timeout_s, settings.verifier_workers)
        self.idle_steps = 0  # in a row, whose rewards taught nothing
        self.warned = False

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Shows the verifier some reference answers before the run. Collective.

        Raises ConfigError where it cannot be started or fails on all of them; says where it accepts none.
        """
        shown = [p for p in prompts if p.answer is not None][:TRIED]
        verdicts = on_rank_0(lambda: self._tried(shown))
        name = f"data.verifier: {self.config.data.verifier}"
        if verdicts and all(v.problem for v in verdicts):
            raise ConfigError(
                f"{name} failed on the reference answer of each of {len(verdicts)} prompts, so that prune.after_drift: "
                f"grpo would have no reward: {verdicts[0].problem}"
            )
        if verdicts and not any(v.correct for v in verdicts):
            self.say(
                f"WARNING: {name} accepts the reference answer of none of {len(verdicts)} prompts; where no response "
                "is right, prune.after_drift: grpo has no reward"
            )

    def _tried(self, prompts: list[Prompt]) -> list[Verdict]:
        try:
            self.verifiers.start()
            return reference_verdicts(prompts, self.verifiers)
        except VerifierError as error:
            raise ConfigError(f"data.verifier: {error}") from error
        finally:
            self.verifiers.close()

    def add_to(self, batch: ScoredBatch, requests: list[Request]) -> dict[str, Any]:
        """Past their drift point the responses learn from their rewards. Collective.

        Returns metrics: reward_mean, of the responses that were generated past their drift point; reward_tokens,
        which learn from a reward (none where a prompt's responses all get the same); reward_problems, responses that
        the verifier could not judge; with the first warning `warning`.
        """
        past_drift = generated_past_drift(requests, self.config)
        members = {i for i, r in enumerate(batch.rollouts) if r.index in past_drift}
        verdicts = on_rank_0(lambda: self._verify(batch.rollouts, sorted(members)))
        rewards = [0.0] * len(batch.rollouts)
        for i, verdict in zip(sorted(members), verdicts, strict=True):
            rewards[i] = float(verdict.correct)
        batch.rewards = [rewards[i] if i in members else None for i in range(len(rewards))]
        copies = self.config.train.responses_per_prompt
        add_rewards(batch, rewards, members, copies, self.config.prune.grpo_coefficient)
        metrics: dict[str, Any] = {
            "reward_mean": sum(rewards) / len(members) if members else None,  # none: where responses are carried over
            "reward_tokens": sum(int(a.count_nonzero()) for a in batch.advantage or ()),
            "reward_problems": sum(v.problem is not None for v in verdicts),
        }
        warning = self._watch(metrics["reward_tokens"], verdicts)
        return metrics | {"warning": warning} if warning else metrics

    def _watch(self, tokens: int, verdicts: list[Verdict]) -> str:
        """The warning, once, where the rewards teach nothing."""
        self.idle_steps = 0 if tokens else self.idle_steps + 1
        warning = ""
        if verdicts and all(v.problem for v in verdicts):
            warning = f"data.verifier: {self.config.data.verifier} failed on every response: {verdicts[0].problem}"
        elif self.idle_steps >= PATIENCE:
            warning = (
                f"no token has learnt from a reward in {self.idle_steps} steps: no response passed its drift point, or "
                "each prompt's responses all got the same reward"
            )
        if not warning or self.warned:
            return ""
        self.warned = True
        self.say(f"WARNING: prune.after_drift: grpo: {warning}")
        return warning

    def _verify(self, rollouts: list[Rollout], indices: list[int]) -> list[Verdict]:
        texts = {i: response_text(rollouts[i], self.tokenizer) for i in indices}
        return self.verifiers.score([Case.of(rollouts[i].prompt, text) for i, text in texts.items()])

    def close(self) -> None:
        self.verifiers.close()
