"""What every engine must do with a response that an earlier step has begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment
from megatron_opd.types import Rollout

SPLIT = 5  # tokens of a response that count as an earlier step's


def go_on(engine: RolloutEngine, requests: Sequence[Request], whole: Sequence[Rollout], sampling: Sampling) -> Any:
    """Generates `whole` once more behind its first tokens: what `assert_goes_on` looks at."""
    long = [(request, r) for request, r in zip(requests, whole, strict=True) if len(r) > SPLIT]
    asked = [replace(request, begun=r.first(SPLIT)) for request, r in long]
    seen: dict[int, list[tuple[int, int]]] = {}

    def watch(segments: list[Segment]) -> set[int]:
        for s in segments:
            seen.setdefault(s.request.index, []).append((s.start, len(s.tokens)))
        return set()

    plain = engine.generate(asked, sampling)
    watched = engine.generate(asked, sampling, watch, 8)
    return {"whole": [r for _, r in long], "plain": plain, "watched": watched, "seen": seen}


def assert_goes_on(result: Any, tolerance: float) -> None:
    """It adds the tokens that were missing, with their log-probs, and keeps to the whole response's budget."""
    assert len(result["whole"]) > 1
    for whole, plain, watched in zip(result["whole"], result["plain"], result["watched"], strict=True):
        for r in (plain, watched):
            assert r.tokens.tolist() == whole.tokens[SPLIT:].tolist() and r.end_reason == whole.end_reason
            torch.testing.assert_close(r.logprobs, whole.logprobs[SPLIT:], atol=tolerance, rtol=0)
            torch.testing.assert_close(r.topk_logprobs, whole.topk_logprobs[SPLIT:], atol=tolerance, rtol=0)
        at = SPLIT
        for start, length in result["seen"][whole.index]:
            assert start == at, "segments start where the response stands"
            at += length
        assert at == len(whole)


def drop_waiting(engine: RolloutEngine, requests: Sequence[Request], sampling: Sampling) -> list[int]:
    """Tokens of each response where the first look stops all: those that wait have none."""
    everyone = {r.index for r in requests}
    rollouts = engine.generate(list(requests), sampling, lambda segments: everyone, 4)
    assert [r.index for r in rollouts] == [r.index for r in requests]
    for r in rollouts:
        assert len(r) == len(r.logprobs) and r.topk_ids.shape == (len(r), sampling.top_logprobs)
    return [len(r) for r in rollouts]
