"""Answers and the teacher's scores of them: one after the other, or, in flight, at the same time."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.models.model import Model
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.until_spent import score_until_spent
from megatron_opd.scoring.watch import Clock, Watcher
from megatron_opd.types import Rollout, TeacherScores


def score(
    engine: RolloutEngine, teacher: Model, requests: list[Request], sampling: Sampling, config: Config, clock: Clock
) -> tuple[list[Rollout], list[TeacherScores]]:
    """Generates and scores one step's answers; collective, the same result on every rank.

    With `score.mode: fused` there are no scores yet: the training pass makes them.
    """
    prune, tokens = config.prune, config.train.tokens_per_microbatch
    if not prune.in_flight:
        with clock.phase("rollout"):
            engine.wake()
            rollouts = engine.generate(requests, sampling)
            engine.sleep()
        if config.score.mode == "fused":
            return rollouts, []
        with clock.phase("score"), teacher.resident():
            if prune.cut == "reliability" and prune.w_drop > 0:
                return rollouts, score_until_spent(teacher, rollouts, prune, tokens, clock)
            return rollouts, score_rollouts(teacher, rollouts, prune, tokens)
    watcher = Watcher(teacher, prune, tokens, len(requests), clock, to_the_end(requests, config))
    with clock.phase("rollout"), teacher.resident():
        engine.wake()
        rollouts = engine.generate(requests, sampling, watcher, prune.segment)
        engine.sleep()
    rollouts = [watcher.cut(r) for r in rollouts]
    return rollouts, [watcher.scores(r) for r in rollouts]


def to_the_end(requests: list[Request], config: Config) -> set[int]:
    """Indices of the answers that are generated on past their drift point."""
    prune = config.prune
    if not prune.in_flight or prune.after_drift == "drop":
        return set()
    if prune.after_drift == "attenuate":
        return {r.index for r in requests}
    prompts = round(prune.grpo_share * config.train.prompts_per_step)  # the loader has shuffled them
    return {r.index for r in requests if r.index // config.train.responses_per_prompt < prompts}
