"""Drift, prune weights, cutting and the response budget."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_opd.config.base import Fraction, Positive, Section
from megatron_opd.plugins import SIGNALS, check_name


class BudgetConfig(Section):
    initial: Positive = 2048
    """Budget of the first step, in generated tokens."""
    minimum: Positive = 1024
    """The budget never falls below this."""
    maximum: Positive = 12288
    """The budget never grows above this; with `preset: off` it is the budget of every step."""
    step: Positive = 100
    """Tokens by which the budget grows or shrinks."""
    margin: int = Field(default=100, ge=0)
    """A response is a hit where its effective length reaches max(minimum, budget - margin)."""
    hit_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of hits in a batch from which the budget grows."""
    patience: Positive = 3
    """Steps in a row below `hit_ratio` after which the budget shrinks."""

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial: {self.initial} must lie between minimum: {self.minimum} and maximum: {self.maximum}"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.5, "cut": "none", "in_flight": False},
    "in_flight": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.0, "cut": "reliability", "in_flight": True},
    "off": {"signal": "none", "cut": "none", "in_flight": False},
}


class PruneConfig(Section):
    preset: Literal["paper", "off", "in_flight"] = "paper"
    """Values for the keys below that are not given. paper: the published method to the letter. in_flight: generation
    and training stop at the drift point. off: plain on-policy distillation, nothing watched, budget at its maximum."""
    signal: str = "overlap"
    """What makes a drift event. overlap: low top-k overlap. teacher_top_p: a sampled token outside the teacher's
    nucleus. none: nothing. MODULE:NAME: your own, a subclass of megatron_opd.prune.signals.DriftSignal."""
    signal_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a signal of your own, given to it by keyword."""
    k: Positive = 16
    """Candidates per position whose overlap is taken; also those of the top-k loss, unless `loss.k` says otherwise."""
    threshold: Fraction = 0.7
    """Overlap below this is an event."""
    teacher_top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Nucleus mass of the `teacher_top_p` signal, inside the teacher's top k."""
    w_drop: float = Field(default=0.01, ge=0.0, le=1.0)
    """Reliability lost per event."""
    w_base: float = Field(default=0.5, ge=0.0)
    """Added to the reliability to give the prune weight."""
    cut: Literal["none", "reliability"] = "none"
    """reliability: what follows the last reliable position is not trained on and costs nothing."""
    in_flight: bool = False
    """Score while generating and stop a response whose reliability is spent."""
    segment: Positive = 128
    """Tokens between two looks of the teacher, in flight."""
    after_drift: Literal["drop", "attenuate", "grpo"] = "drop"
    """in_flight only. drop: responses end at their drift point. attenuate: they are generated on and trained on with
    w_base. grpo: for `grpo_share` of the prompts they are generated on, and positions past the drift point learn from
    the verifier's reward, normalised over the prompt's responses."""
    grpo_share: Fraction = 0.25
    """Share of prompts whose responses are generated to the end for `after_drift: grpo`."""
    grpo_coefficient: float = Field(default=1.0, ge=0.0)
    """Weight of the reward's policy gradient beside the distillation loss."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """The response budget."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("preset") is False:  # YAML reads a bare off as false
                values = {**values, "preset": "off"}
            return {**PRESETS.get(values.get("preset", "paper"), {}), **values}
        return values

    @field_validator("signal")
    @classmethod
    def _known_signal(cls, value: str) -> str:
        return check_name(value, SIGNALS)

    @property
    def watches_drift(self) -> bool:
        """Whether there are drift events at all, and with them prune weights and a budget that moves."""
        return self.signal != "none"

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if not self.watches_drift and self.in_flight:
            raise ValueError("in_flight: true needs a signal: overlap, teacher_top_p or your own")
        if not self.watches_drift and self.cut != "none":
            raise ValueError(f"cut: {self.cut} needs a signal: overlap, teacher_top_p or your own")
        if self.cut == "reliability" and self.w_base > 0:
            raise ValueError(
                f"cut: reliability drops what w_base: {self.w_base} would train on; set w_base: 0 or cut: none"
            )
        if self.in_flight and self.cut == "none" and self.after_drift == "drop":
            raise ValueError("in_flight: true with after_drift: drop stops at the drift point; set cut: reliability")
        if self.after_drift != "drop" and not self.in_flight:
            raise ValueError(f"after_drift: {self.after_drift} needs in_flight: true")
        if self.after_drift == "grpo" and self.cut == "none":
            raise ValueError("after_drift: grpo replaces the teacher past the drift point: set cut: reliability")
        if self.after_drift == "attenuate" and (self.cut != "none" or self.w_base == 0):
            raise ValueError("after_drift: attenuate trains past the drift point: set cut: none and w_base above 0")
        return self
