"""avg@k, pass@k and maj@k with bootstrap confidence intervals, as pure functions of judged responses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class JudgedResponse:
    """One judged response. `length` in tokens; `truncated`: ended by its length limit instead of EOS."""

    uid: int
    sample: int
    correct: bool
    score: float
    extracted: str | None
    length: int
    truncated: bool
    problem: str | None = None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k responses drawn without replacement from `samples` hold a correct one: the unbiased estimator
    1 - C(samples - correct, k) / C(samples, k) of the Codex paper (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 to {samples} responses")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(responses: Sequence[JudgedResponse]) -> float:
    """Whether the most frequent answer is correct; a tie of m answers counts with 1/m for a correct one among them.

    Correct answers are one vote's worth each for the same answer, however they are written. Where nothing was
    extracted there is no vote.
    """
    votes: dict[str | None, int] = defaultdict(int)
    for a in responses:
        if a.correct:
            votes[None] += 1
        elif a.extracted is not None:
            votes["".join(a.extracted.split())] += 1
    most = max(votes.values(), default=0)
    leaders = [key for key, count in votes.items() if count == most]
    return 1.0 / len(leaders) if None in leaders else 0.0


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of per-prompt `values` [P], prompts being resampled with replacement."""
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = [data[generator.integers(0, len(data), len(data))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(responses: Sequence[JudgedResponse], k: int, seed: int = 0) -> dict[str, float]:
    """One data set's numbers; every prompt must have k responses.

    Keys: accuracy (= avg@k); avg@k, maj@k and pass@1, 2, 4, ... k (k as a number), each with `_low` and `_high` of its
    95% interval; score (mean score with partial credit), prompts, responses, length_mean (tokens), truncated (share),
    no_answer (share), verifier_problems (count).
    """
    by_prompt: dict[int, list[JudgedResponse]] = defaultdict(list)
    for a in responses:
        by_prompt[a.uid].append(a)
    if not by_prompt:
        raise ValueError("no responses to summarize")
    for uid, group in by_prompt.items():
        if len(group) != k:
            raise ValueError(f"prompt {uid} has {len(group)} responses, not {k}")
    counts = [sum(a.correct for a in group) for group in by_prompt.values()]
    values = {f"avg@{k}": [c / k for c in counts], f"maj@{k}": [majority(g) for g in by_prompt.values()]}
    for size in sorted({k, *(2**i for i in range(k.bit_length()))}):
        values[f"pass@{size}"] = [pass_at_k(k, c, size) for c in counts]
    result: dict[str, float] = {"accuracy": float(np.mean(values[f"avg@{k}"]))}
    for name, per_prompt in values.items():
        result[name] = float(np.mean(per_prompt))
        result[f"{name}_low"], result[f"{name}_high"] = bootstrap_interval(per_prompt, seed)
    result["score"] = float(np.mean([a.score for a in responses]))
    result["prompts"] = len(by_prompt)
    result["responses"] = len(responses)
    result["length_mean"] = float(np.mean([a.length for a in responses]))
    result["truncated"] = float(np.mean([a.truncated for a in responses]))
    result["no_answer"] = float(np.mean([a.extracted is None for a in responses]))
    result["verifier_problems"] = sum(a.problem is not None for a in responses)
    return result
