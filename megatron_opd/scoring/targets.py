"""What the loss takes for the teacher's log-probs, where it is not the teacher alone. One class each.

    Extrapolated  loss.reward_scale: ExOPD's reward beyond the teacher's
    Proximal      loss.proximal: a mixture of teacher and sampler, TOP-D's proximal teacher
    GroupReturns  loss.advantage: group: TOP-D's returns, standardised over a prompt's responses

Each makes the batch that is trained on from the one that was scored; drift, metrics and alarms see the teacher itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_opd.config import Config
from megatron_opd.losses import vocab_parallel_logprobs
from megatron_opd.models.model import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.scoring.response_weights import response_weights
from megatron_opd.scoring.separate import as_the_teacher_reads, read_rollouts
from megatron_opd.scoring.target import Target
from megatron_opd.scoring.teacher_view import Candidates
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores


class Extrapolated(Target):
    """G-OPD (arXiv 2602.12125): A = s (log q - log ref) - (log p - log ref), s = loss.reward_scale.

    That is plain distillation from log q' = s log q - (s - 1) log ref, which stands in the teacher's place at the
    candidates and at the sampled token. It is no distribution's: q' is not normalised.
    """

    def __init__(self, scale: float, reference: Model, tokens_per_microbatch: int, teachers_prompt: bool) -> None:
        """teachers_prompt: the reference reads the teacher's prompts, as a model that the teacher came from does."""
        self.scale, self.reference, self.tokens = scale, reference, tokens_per_microbatch
        self.teachers_prompt = teachers_prompt

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        read = [r.first(max(s.measured, 1)) for r, s in zip(batch.rollouts, batch.scores, strict=True)]
        if self.teachers_prompt:
            read = [as_the_teacher_reads(r) for r in read]
        with self.reference.resident():
            views = read_rollouts(self.reference, read, self._view, self.tokens)
        scores = [self.extrapolated(s, view) for s, view in zip(batch.scores, views, strict=True)]
        return replace(batch, scores=scores)

    def _view(self, logits: Tensor, asked: Candidates) -> Fields:
        values = vocab_parallel_logprobs(
            logits, torch.cat([asked.ids, asked.sampled[:, None]], 1), self.reference.vocab_shard
        )
        return {"logprobs": values[:, :-1], "sampled": values[:, -1]}

    def extrapolated(self, scores: TeacherScores, reference: Fields) -> TeacherScores:
        """The scores with log q' in the place of log q, as far as the teacher has read."""
        n = scores.measured
        logprobs, sampled = scores.logprobs.clone(), scores.sampled_logprobs.clone()
        logprobs[:n] = self.scale * logprobs[:n] - (self.scale - 1) * reference["logprobs"][:n]
        sampled[:n] = self.scale * sampled[:n] - (self.scale - 1) * reference["sampled"][:n]
        return replace(scores, logprobs=logprobs, sampled_logprobs=sampled)


class Proximal(Target):
    """TOP-D's proximal teacher (arXiv 2607.04751): a q + (1 - a) p_old, mixed in probabilities, a = loss.proximal.

    log q - log p_old becomes log(a q / p_old + 1 - a), at least log(1 - a), however little the teacher gives a token.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        scores = []
        for r, s in zip(batch.rollouts, batch.scores, strict=True):
            logprobs = self.mixed(s.logprobs, r.topk_logprobs)
            scores.append(replace(s, logprobs=logprobs, sampled_logprobs=self.mixed(s.sampled_logprobs, r.logprobs)))
        return replace(batch, scores=scores)

    def mixed(self, teacher: Tensor, sampler: Tensor) -> Tensor:
        """log(a q + (1 - a) p_old) from both models' log-probs; with a = 1 the teacher's own."""
        if self.share == 1:
            return teacher
        return torch.logaddexp(teacher + math.log(self.share), sampler + math.log1p(-self.share))


class GroupReturns(Target):
    """TOP-D's advantage: a token's reward and the mean of the later ones in its response, standardised over all tokens
    of the prompt's responses that the teacher has read; a policy gradient of the sampled tokens in place of the loss.

    The sum of a prompt's terms is divided by its tokens, and these means are averaged over the prompts.
    """

    def __init__(self, copies: int) -> None:
        """copies: responses of a prompt."""
        self.copies = copies

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        advantage = []
        prompts = len(batch.rollouts) // self.copies
        for start in range(0, len(batch.rollouts), self.copies):
            group = range(start, start + self.copies)
            returns = [self._returns(batch.rollouts[i], batch.scores[i]) for i in group]
            tokens = sum(len(r) for r in returns)
            factor = batch.response_tokens / (prompts * max(tokens, 1))  # the step divides by the batch's tokens
            for i, value in zip(group, standardised(returns), strict=True):
                padded = torch.nn.functional.pad(value, (0, len(batch.rollouts[i]) - len(value)))
                advantage.append((factor * padded).float() * batch.prune_weight[i])
        return replace(batch, advantage=advantage, prune_weight=[torch.zeros_like(w) for w in batch.prune_weight])

    def _returns(self, rollout: Rollout, scores: TeacherScores) -> Tensor:
        return returns_of((scores.sampled_logprobs - rollout.logprobs)[: scores.measured].double())


def returns_of(rewards: Tensor) -> Tensor:
    """R_k = r_k + the mean of the later r, [T] -> [T]; the last token has none behind it."""
    later = rewards.flip(0).cumsum(0).flip(0) - rewards
    behind = torch.arange(len(rewards) - 1, -1, -1, dtype=rewards.dtype)
    return rewards + later / behind.clamp(min=1)


def standardised(returns: list[Tensor]) -> list[Tensor]:
    """Less their mean, divided by their standard deviation (n - 1), over all of them; zeros where they are equal."""
    whole = torch.cat(returns)
    spread = whole.std() if len(whole) > 1 else whole.new_zeros(())
    if not spread > 1e-8:
        return [torch.zeros_like(r) for r in returns]
    return [(r - whole.mean()) / spread for r in returns]


def make_targets(config: Config, reference: Model | None, teachers: Teachers) -> list[Target]:
    """What the config names, in the order in which it is applied; nothing where the teacher is taken as it is."""
    loss = config.loss
    targets: list[Target] = []
    if reference is not None:
        own = loss.reference is not None
        targets.append(Extrapolated(loss.reward_scale, reference, config.train.tokens_per_microbatch, own))
    if loss.proximal is not None and loss.proximal < 1:
        targets.append(Proximal(loss.proximal))
    if loss.advantage == "group":
        targets.append(GroupReturns(config.train.responses_per_prompt))
    return targets + response_weights(config, teachers)
