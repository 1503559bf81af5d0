"""Prompts and evaluation."""

from __future__ import annotations

import datetime
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import Count, DataSource, FilePath, Positive, Seconds, Section, Seed, VerifierName

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # any day will do: this one is the default of Llama 3.1's template


class DataConfig(Section):
    prompts: DataSource
    """JSONL (.jsonl) or Parquet (.parquet) file, reasoning_gym:NAME, or MODULE:FUNCTION: your own, called with (size,
    seed), returns rows as objects, the same ones each time."""
    prompt_key: str = "prompt"
    """Column of the prompt: text, or chat messages; dots reach into objects. A file without it is looked through for
    the columns that DAPO-Math-17K, AIME, AMC and HMMT use, and the choice is reported."""
    answer_key: str = "answer"
    """Column of the reference answer; dots reach into objects (reward_model.ground_truth). Known columns are found as
    for prompt_key."""
    source_key: str = "source"
    """Column that names the data set; missing is fine."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template. none: the text as it is."""
    thinking: bool | None = None
    """Passed to chat templates that have a thinking switch; null leaves their default. Refused where it changes
    nothing."""
    date: datetime.date = TEMPLATE_DATE
    """The day that chat templates which write the date are given: the same prompts today and tomorrow."""
    system: str | None = None
    """System message put in front of chat prompts that bring none of their own."""
    suffix: str = ""
    """Instruction put behind every prompt's text."""
    verifier: VerifierName = "math"
    """Scores training responses for `prune.after_drift: grpo`; values as eval.sets.verifier."""
    tokenizer: FilePath | None = None
    """Directory or sentencepiece .model file; null takes the student's."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out and counted."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Prompts that repeat an earlier one's text are counted either way (DAPO-Math-17K holds each a hundred times)."""
    shuffle: bool = True
    """Shuffle by seed and epoch."""
    size: int = Field(default=10000, gt=0, le=10_000_000)
    """Prompts to draw from reasoning_gym:NAME; the most that are taken from MODULE:FUNCTION."""
    seed: Seed = 0
    """Seed of reasoning_gym:NAME and of MODULE:FUNCTION. Of reasoning-gym, different seeds never draw the
    same item."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.template == "none" and (self.system is not None or self.thinking is not None):
            raise ValueError("system and thinking are for template: chat; remove them or set template: chat")
        return self


class EvalSetConfig(Section):
    renamed: ClassVar[dict[str, str]] = {"answers_per_prompt": "responses_per_prompt"}

    name: str = Field(pattern=r"^[\w.@-]+$")
    """Name in the metrics and of the responses' file: letters, digits and . @ _ -"""
    prompts: DataSource
    """As data.prompts."""
    verifier: VerifierName = "math"
    """math: math-verify on the boxed answer. reasoning_gym: the data set's own scorer. exact: equal text.
    MODULE:FUNCTION: your own, called with (response, answer, metadata), returns a score from 0 to 1."""
    responses_per_prompt: Positive = 1
    """k of avg@k, pass@k and maj@k."""
    max_tokens: Positive = 31744
    """Cap on generated tokens, independent of the training budget."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling."""
    limit: Positive | None = None
    """Use only the first N prompts; of reasoning_gym:NAME and MODULE:FUNCTION draw N (null: 500)."""
    seed: Seed = 1
    """Seed of reasoning_gym:NAME and of MODULE:FUNCTION; keep it different from data.seed."""
    prompt_key: str | None = None
    """As data.prompt_key; null takes that."""
    answer_key: str | None = None
    """As data.answer_key; null takes that."""
    suffix: str | None = None
    """As data.suffix; null takes that."""
    thinking: bool | None = None
    """As data.thinking; null takes that."""


class EvalConfig(Section):
    renamed: ClassVar[dict[str, str]] = {"save_answers": "save_responses", "chunk_answers": "chunk_responses"}

    every: Count = 20
    """Evaluate after every N steps; 0 for never."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    sets: list[EvalSetConfig] = Field(default_factory=list)
    """Data sets."""
    verifier_timeout_s: Seconds = 10.0
    """A verifier that takes longer on one response counts it as wrong."""
    verifier_workers: Positive = 2
    """Processes that verify responses, on the first rank's machine."""
    save_responses: bool = True
    """Write every response to RUN/eval/ as JSONL; an interrupted evaluation goes on from that file."""
    chunk_responses: Positive = 1024
    """Responses generated between two writes of that file, which is what an interruption can lose."""
    seed: Seed = 0
    """Seed of evaluation's sampling."""
