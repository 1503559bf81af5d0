"""The interface of every rollout engine.

All methods are collective: every rank of the job calls them with equal arguments, and every rank gets the whole
result, in the order of the requests. An engine never sees the training loop; pruning in flight reaches it through
the `watch` argument.

Your own is a subclass of `RolloutEngine` in a module of your own, `rollout.engine: mymodule:MyEngine`; it is built with
an `EngineSetup` and, by keyword, with `rollout.engine_options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_opd.errors import RunError
from megatron_opd.types import Prompt, Rollout

if TYPE_CHECKING:  # the modules that a vLLM server loads import this one, and neither of these
    from megatron_opd.config import Config
    from megatron_opd.models.model import Model


class RolloutError(RunError):
    """Generation cannot go on; the message says where and why."""


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is built with, on every rank."""

    config: Config
    student: Model  # as this rank holds it; its `vocab_size` is the number of ids that may be sampled
    eos_ids: set[int]  # they end a response and belong to it
    max_tokens: int  # of the longest prompt and response that the config can reach, in training or evaluation


@dataclass(frozen=True)
class Sampling:
    """How one call of `generate` samples.

    `top_logprobs` is K, the candidates returned per position (0: none are). Log-probs are always those of
    temperature 1.0 over the full vocabulary, whatever temperature, top-p and top-k the sampling uses.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_logprobs: int = 0


@dataclass(frozen=True)
class Request:
    """One response to generate. `index` seeds the sampler together with `Sampling.seed`: it is the response's position
    in the global batch, so that neither layout nor the order of completion changes the tokens."""

    prompt: Prompt
    index: int
    # What an earlier step has generated of it: the engine goes on behind it, and shows and returns what it adds.
    begun: Rollout | None = None
    rewarded: bool = False  # prune.after_drift: grpo: its prompt's responses are generated past their drift points

    @property
    def generated(self) -> int:
        """Response tokens that are there already."""
        return 0 if self.begun is None else len(self.begun)

    @property
    def tokens(self) -> list[int]:
        """What the engine reads before it samples: the prompt, and what is there of the response."""
        return self.prompt.tokens if self.begun is None else self.prompt.tokens + self.begun.tokens.tolist()


@dataclass
class Segment:
    """Newly generated tokens of one running response, as the watcher sees them."""

    request: Request
    start: int  # response position of the first token
    tokens: Tensor  # [S] int64
    topk_ids: Tensor  # [S, K] int64
    topk_logprobs: Tensor  # [S, K] float32
    finished: bool  # the response ended in this segment (EOS or budget)


# Called with the segments that became ready since the last call, identical on every rank; returns the indices of the
# requests to stop. Segments of one response arrive in order; the last one has finished=True.
Watch = Callable[[list[Segment]], set[int]]


class RolloutEngine(ABC):
    """Generates responses with the student's current parameters."""

    policy_version: int = -1  # optimizer steps behind the parameters that the engine holds; -1: none handed over yet
    # Response tokens that the last `generate` sampled, over all replicas, the same on every rank: also those behind a
    # stop, and those that were sampled once more. None: the engine samples no more than it returns.
    tokens_sampled: int | None = None
    # To be called while `generate` goes on, as often as is convenient, with what this process knows of: responses that
    # have ended, all of them, tokens sampled so far. None: nobody looks.
    on_progress: Callable[[int, int, int], None] | None = None

    @abstractmethod
    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        """Generates one response per request; see the module's docstring.

        With `watch`, running responses are shown to it every `segment` tokens and the ones it names stop there
        (end_reason "drift"), their slot going to the next waiting request; a waiting request that it names is dropped
        and has no tokens.
        """

    @abstractmethod
    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        """Takes over the student's parameters. `named_parameters()` yields (Hugging Face name, full tensor) on every
        rank and is itself collective; engines that share the trainer's parameters need not call it."""

    @abstractmethod
    def probe(self, tokens: list[int]) -> Tensor:
        """Log-probs [T-1] float32 that the engine's current parameters give to tokens[1:], each after what precedes it.

        The trainer compares them with its own after each hand-over: an engine that missed one, or that the trainer
        failed to reach, shows here. An engine with several copies of the model raises where the copies disagree.
        """

    def sleep(self) -> None:
        """Frees what training needs (GPU memory); `wake` undoes it."""

    def wake(self) -> None:
        """Makes the engine ready to generate."""

    def close(self) -> None:
        """Ends what the engine started."""
