"""What flows through a training step.

Glossary, one word per thing:

student, teacher      the model that learns and the model that judges
prompt, response      the given tokens and the generated ones (EOS included where the model ended by itself)
rollout log-probs     of the engine that sampled; *student log-probs*: of the trainer's own forward pass
top-k                 the K most likely tokens of one model at one position, ties to the lowest id
overlap               share of its top-k that the student has in common with the teacher, per position
drift event           a response position whose overlap lies below the threshold
reliability           1 minus the price of all events so far, never below 0, never recovering
prune weight          what a position's loss is multiplied with; a bare "weight" never means model parameters
effective length      number of response positions with reliability left
budget                the cap on generated tokens of the next step
row                   several sequences packed end to end: what one micro-batch of a schedule runs

Letters in shapes: T tokens of one response, K candidates, B responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

END_EOS = "eos"  # the student ended by itself
END_LENGTH = "length"  # cut by the budget
END_DRIFT = "drift"  # stopped in flight: its reliability was spent
UNFINISHED = "unfinished"  # no end: it goes on in the next step (rollout.carry_over), and is not trained on yet


@dataclass
class Prompt:
    """One prompt. `uid` is unique and stable within a data set (its position in the source file)."""

    uid: int
    text: str
    tokens: list[int]
    answer: str | None = None
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    own_teacher_tokens: list[int] | None = None  # what the teacher reads where that is another text

    @property
    def teacher_tokens(self) -> list[int]:
        """What the teacher reads before a response: `tokens`, unless it has a context of its own."""
        return self.tokens if self.own_teacher_tokens is None else self.own_teacher_tokens


@dataclass
class Rollout:
    """One generated response with the sampler's view of it.

    `index` is its position in the global batch (prompt-major: prompt * responses_per_prompt + number); it seeds
    the sampler, so the same index gives the same tokens on every layout.
    """

    prompt: Prompt
    index: int
    tokens: Tensor  # [T] int64, EOS included
    logprobs: Tensor  # [T] float32, of the sampled tokens, temperature 1, full vocabulary, before top-p
    topk_ids: Tensor  # [T, K] int64, the student's K most likely tokens, descending, ties to the lowest id
    topk_logprobs: Tensor  # [T, K] float32
    end_reason: str  # END_EOS, END_LENGTH or END_DRIFT
    policy_version: int  # number of optimizer steps behind the parameters that sampled it, its last token's
    versions: Tensor | None = None  # [T] int32, of each token where the response spans several

    def __len__(self) -> int:
        return int(self.tokens.numel())

    def first(self, count: int) -> Rollout:
        """The response's first `count` tokens."""
        return replace(
            self,
            tokens=self.tokens[:count],
            logprobs=self.logprobs[:count],
            topk_ids=self.topk_ids[:count],
            topk_logprobs=self.topk_logprobs[:count],
            versions=None if self.versions is None else self.versions[:count],
        )


@dataclass
class TeacherScores:
    """What the teacher says of one response, on the student's candidates.

    It has read the first M tokens: all, or those up to the point where reliability is spent.
    """

    logprobs: Tensor  # [T, K] float32, the teacher's log-probs at the student's top-k ids; behind M the student's own
    sampled_logprobs: Tensor  # [T] float32, at the sampled tokens; behind M the student's own
    columns: dict[str, Tensor]  # [M, ...] by name, what the drift signal has kept of the teacher's logits
    measured: int  # M
    read: int | None = None  # response tokens that it has read, also those that were cut off since; None: M
    # [T, hidden size] in the teacher's precision: what its output layer reads; with score.payload: hidden. 0 behind M.
    hidden: Tensor | None = None
    stop_logprobs: Tensor | None = None  # [M] float32, of all the teacher's terminators together; with loss.stop: event


@dataclass
class ScoredBatch:
    """One step's responses with everything that the training step needs, identical on every rank.

    Lists run over the B responses of the global batch. `prune_weight[i]` is [T_i] float32; positions behind
    `kept_length[i]` are not sent through the training schedule.
    """

    rollouts: list[Rollout]
    scores: list[TeacherScores]
    prune_weight: list[Tensor]
    kept_length: list[int]
    effective_length: list[int]
    events: list[int]
    response_tokens: int  # the loss's denominator: all response tokens of the global batch
    reverse_kl: list[Tensor] | None = None  # [T_i] float32, over the candidates, where no table of them is kept
    token_weight: list[Tensor] | None = None  # [T_i] float32, in prune_weight already; of prune.token_weighting
    rewards: list[float | None] | None = None  # of the verifier, None where it has not looked
    advantage: list[Tensor] | None = None  # [T_i] float32 of the verifier's reward, 0 where the teacher judges
