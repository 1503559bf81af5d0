"""Token weighting: how much each token of a scored batch counts, whatever drift says. `prune.token_weighting` names it.

    iw             IW-OPD: falls with the share of the response's disagreement that lies before the token
    tip            TIP: the tokens of each response with the most student entropy or disagreement
    random_window  a window at a random position: the control for methods that keep a part of a response

The weights multiply the prune weights, so that they go with a drift signal or without one. Your own is a subclass of
`TokenWeighting` in a module of your own, `prune.token_weighting: mymodule:MyWeighting`; it is built with
`prune.token_weighting_options` by keyword.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opd.errors import ConfigError
from megatron_opd.plugins import TOKEN_WEIGHTINGS, build_part
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores


class TokenWeighting(ABC):
    """Base of all.

    mean_over_kept: the loss is the mean over tokens of non-zero weight, not over all response tokens.
    """

    mean_over_kept: ClassVar[bool] = False

    @abstractmethod
    def weigh(self, rollouts: list[Rollout], scores: list[TeacherScores]) -> list[Tensor]:
        """The weight, at least 0, of each token of each response: [T] float32 of every response of the global batch.

        Every rank calls this with the same batch and must find the same weights. Behind `scores[i].measured` the
        teacher has read nothing, and its log-probs are the student's own.
        """

    def apply_to(self, batch: ScoredBatch) -> None:
        """Multiplies the prune weights of `batch`; what weighs nothing at the end of a response is not trained on.

        Raises ValueError where `weigh` returned other shapes, or something negative or not finite.
        """
        weights = self.weigh(batch.rollouts, batch.scores)
        for rollout, weight in zip(batch.rollouts, weights, strict=True):
            if weight.shape != (len(rollout),) or not bool(((weight >= 0) & weight.isfinite()).all()):
                raise ValueError(
                    f"{type(self).__name__}.weigh: of a response of {len(rollout)} tokens it returned "
                    f"{list(weight.shape)}; it must be that many finite numbers of at least 0"
                )
        batch.prune_weight = [p * w.to(p.dtype) for p, w in zip(batch.prune_weight, weights)]
        batch.token_weight = weights
        ends = [int(w.nonzero()[-1]) + 1 if w.any() else 0 for w in weights]
        batch.kept_length = [min(kept, end) for kept, end in zip(batch.kept_length, ends)]
        if self.mean_over_kept:
            batch.response_tokens = max(1, sum(int((w > 0).sum()) for w in weights))


class DisagreementBefore(TokenWeighting):
    """IW-OPD (arXiv 2606.22600): g_t = 1 + (w_max - 1)(1 - F), F the share of the response's disagreement before t.

    Disagreement is |log q - log p_old| of the sampled token, p_old being the sampler's. The weights are not
    renormalised, as in the released code: a response of T tokens weighs from T to w_max T.
    """

    def __init__(self, w_max: float = 1.5) -> None:
        """w_max: weight of a response's first token. Raises ValueError below 1."""
        if not w_max >= 1:
            raise ValueError(f"w_max: {w_max} must be at least 1; 1 weighs every token alike")
        self.w_max = w_max

    def weigh(self, rollouts: list[Rollout], scores: list[TeacherScores]) -> list[Tensor]:
        return [self.of(s.sampled_logprobs - r.logprobs) for r, s in zip(rollouts, scores)]

    def of(self, gap: Tensor) -> Tensor:
        """Weights [T] from log q - log p_old [T] of one response."""
        apart = gap.double().abs()
        before = (apart.cumsum(0) - apart) / (apart.sum() + 1e-8)
        return (1 + (self.w_max - 1) * (1 - before)).float()


class EntropyOrDisagreement(TokenWeighting):
    """TIP (arXiv 2604.14084): of each response's m tokens the floor(share m) with the largest s = h + d - h d.

    h: the student's entropy, clipped at the batch's 98th percentile; d: KL of student to teacher; each scaled to 0..1
    over the batch's tokens. Both are taken over the student's K candidates and one bucket for the rest, since the
    sampler and the teacher give no more; the paper has the whole vocabulary. Ties go to the earlier token.
    """

    mean_over_kept = True

    def __init__(self, share: float = 0.5, clip_percentile: float = 98.0) -> None:
        """share: of a response's tokens that is kept. Raises ValueError outside 0 < share <= 1 or 0..100."""
        if not 0 < share <= 1:
            raise ValueError(f"share: {share} must lie in (0, 1]")
        if not 0 < clip_percentile <= 100:
            raise ValueError(f"clip_percentile: {clip_percentile} must lie in (0, 100]")
        self.share, self.clip_percentile = share, clip_percentile

    def weigh(self, rollouts: list[Rollout], scores: list[TeacherScores]) -> list[Tensor]:
        lengths = [s.measured for s in scores]
        student = [with_rest(r.topk_logprobs[:n]) for r, n in zip(rollouts, lengths)]
        teacher = [with_rest(s.logprobs[:n]) for s, n in zip(scores, lengths)]
        entropy = torch.cat([-(p.exp() * p).sum(-1) for p in student])
        apart = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(student, teacher)])
        if len(entropy):
            entropy = scaled(torch.minimum(entropy, percentile(entropy, self.clip_percentile)))
        scores_of = either(entropy, scaled(apart)).split(lengths)
        return [self._best(s, len(r)) for s, r in zip(scores_of, rollouts)]

    def _best(self, scores: Tensor, length: int) -> Tensor:
        kept = torch.zeros(length)
        order = scores.argsort(descending=True, stable=True)
        kept[order[: int(self.share * len(scores) + 1e-9)]] = 1.0
        return kept


class RandomWindow(TokenWeighting):
    """One window of floor(share T) tokens, at least one, at a random position in each response.

    What a method that keeps a part of each response has to beat. The position follows from `seed`, the policy version
    and the response's index alone.
    """

    mean_over_kept = True

    def __init__(self, share: float = 0.25, seed: int = 0) -> None:
        """share: of a response's tokens that is kept. Raises ValueError outside 0 < share <= 1."""
        if not 0 < share <= 1:
            raise ValueError(f"share: {share} must lie in (0, 1]")
        self.share, self.seed = share, seed

    def weigh(self, rollouts: list[Rollout], scores: list[TeacherScores]) -> list[Tensor]:
        return [self._window(r) for r in rollouts]

    def _window(self, rollout: Rollout) -> Tensor:
        length = len(rollout)
        width = min(length, max(1, int(self.share * length)))
        seed = (self.seed * 1_000_003 + rollout.policy_version) * 1_000_003 + rollout.index
        draw = torch.Generator().manual_seed(seed % 2**63)
        start = int(torch.randint(length - width + 1, (1,), generator=draw))
        weight = torch.zeros(length)
        weight[start : start + width] = 1.0
        return weight


def with_rest(logprobs: Tensor) -> Tensor:
    """[T, K] log-probs of candidates -> [T, K + 1] float64 with that of everything else, at least 1e-8, at the end."""
    logprobs = logprobs.double()
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log()
    return torch.cat([logprobs, rest], dim=-1).nan_to_num(neginf=-1e4)


def percentile(values: Tensor, percent: float) -> Tensor:
    """The percentile of [n] values, linear between two of them; torch.quantile takes no more than 16 million."""
    ordered, at = values.sort().values, (len(values) - 1) * percent / 100
    below = int(at)
    above = min(below + 1, len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], at - below)


def scaled(values: Tensor) -> Tensor:
    """From the smallest to the largest value, [n] to 0..1; zeros where all are equal."""
    if not len(values):
        return values
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def either(h: Tensor, d: Tensor) -> Tensor:
    """TIP's soft-OR of two numbers in 0..1: large where one of them is."""
    return h + d - h * d


def make_token_weighting(name: str, options: Mapping[str, Any]) -> TokenWeighting | None:
    """What `prune.token_weighting` names; None for "none". Raises ConfigError where it cannot be imported or built."""
    if name == "none":
        return None
    weights = build_part("prune.token_weighting", name, TOKEN_WEIGHTINGS, (), options)
    if not isinstance(weights, TokenWeighting):
        raise ConfigError(
            f"prune.token_weighting: {name} is no subclass of megatron_opd.prune.token_weighting.TokenWeighting"
        )
    return weights
