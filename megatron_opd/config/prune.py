"""Drift, prune weights, cutting and the response budget."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import Count, Fraction, Positive, Section, SignalName, WeightingName


class BudgetConfig(Section):
    rule: Literal["adaptive", "staircase", "share"] = "adaptive"
    """adaptive: moves with the share of hits, the published controller; without a drift signal it stays at `maximum`.
    staircase: grows by `step` after every `patience` steps, from `initial` to `maximum`. share: stays at `share` of
    `maximum`."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """The budget of every step as a share of `maximum`, for `rule: share`."""
    initial: Positive = 2048
    """Budget of the first step, in generated tokens."""
    minimum: Positive = 1024
    """The budget never falls below this."""
    maximum: Positive = 12288
    """The budget never grows above this; with `preset: off` it is the budget of every step."""
    step: Positive = 100
    """Tokens by which the budget grows or shrinks."""
    margin: Count = 100
    """A response is a hit where its effective length reaches max(minimum, budget - margin)."""
    hit_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of hits in a batch from which the budget grows."""
    patience: Positive = 3
    """Steps in a row below `hit_ratio` after which the budget shrinks; with `rule: staircase`, steps on each stair."""

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial: {self.initial} must lie between minimum: {self.minimum} and maximum: {self.maximum}"
            )
        if self.share != 1.0 and self.rule != "share":
            raise ValueError(f"share: {self.share} needs rule: share; {self.rule} moves between minimum and maximum")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.5, "cut": "none", "in_flight": False},
    "in_flight": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.0, "cut": "reliability", "in_flight": True},
    "off": {"signal": "none", "cut": "none", "in_flight": False},
    # What is published beside the method; docs/methods.md has the sources and which numbers are ours.
    "topd": {"signal": "none", "budget": {"rule": "share", "share": 0.25}},
    "popd": {
        "signal": "none",
        "budget": {"rule": "staircase", "initial": 1024, "minimum": 1024, "step": 1024, "patience": 10},
    },
    "prefix": {
        "signal": "none",
        "budget": {"rule": "staircase", "initial": 256, "minimum": 256, "step": 256, "patience": 10},
    },
    "iw": {"signal": "none", "token_weighting": "iw"},
    "tip": {"signal": "none", "token_weighting": "tip"},
    "random_window": {"signal": "none", "token_weighting": "random_window"},
}


class PruneConfig(Section):
    preset: Literal["paper", "off", "in_flight", "topd", "popd", "prefix", "iw", "tip", "random_window"] = "paper"
    """Values for the keys below that are not given. paper: the published method to the letter. in_flight: generation
    and training stop at the drift point. off: plain on-policy distillation, nothing watched, budget at its maximum.
    The others are published relatives, without a drift signal (docs/methods.md): topd (budget at a share of its
    maximum), popd and prefix (a growing budget), iw and tip (token weights), random_window (their control)."""
    signal: SignalName = "overlap"
    """What makes a drift event. overlap: low top-k overlap. teacher_top_p: a sampled token outside the teacher's
    nucleus. none: nothing. MODULE:NAME: your own, a subclass of megatron_opd.prune.signals.DriftSignal."""
    signal_options: dict[str, Any] = Field(default_factory=dict)
    """Options of a signal of your own, given to it by keyword."""
    token_weighting: WeightingName = "none"
    """How much each response token counts beside drift. none: all the same. iw: falls with the disagreement before it.
    tip: those with most entropy or disagreement alone. random_window: those of a random window alone. MODULE:NAME: your
    own, a subclass of megatron_opd.prune.token_weighting.TokenWeighting."""
    token_weighting_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the token weights, given to them by keyword: w_max for iw; share and clip_percentile for tip; share
    and seed for random_window."""
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
            name = values.get("preset", "paper")
            preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
            budget = values.get("budget", {})
            if "budget" in preset and isinstance(budget, dict):
                values = {**values, "budget": {**preset["budget"], **budget}}
            return {**preset, **values}
        return values

    @property
    def watches_drift(self) -> bool:
        """Whether there are drift events at all, and with them prune weights."""
        return self.signal != "none"

    @property
    def moves_budget(self) -> bool:
        """Whether the budget changes from step to step."""
        return self.budget.rule == "staircase" or (self.budget.rule == "adaptive" and self.watches_drift)

    def reward_prompts(self, prompts: int) -> int:
        """Of a step's prompts, how many have responses that go on past the drift point, for the verifier's reward."""
        return round(self.grpo_share * prompts)

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
        if self.token_weighting_options and self.token_weighting == "none":
            raise ValueError(f"token_weighting_options: {self.token_weighting_options} need token_weighting")
        if self.token_weighting != "none" and self.after_drift == "grpo":
            raise ValueError(
                f"token_weighting: {self.token_weighting} weighs what the teacher judges; after_drift: grpo has "
                "positions that it does not judge: set after_drift: drop or token_weighting: none"
            )
        if self.after_drift != "drop" and not self.in_flight:
            raise ValueError(f"after_drift: {self.after_drift} needs in_flight: true")
        if self.after_drift == "grpo" and self.cut == "none":
            raise ValueError("after_drift: grpo replaces the teacher past the drift point: set cut: reliability")
        if self.after_drift == "attenuate" and (self.cut != "none" or self.w_base == 0):
            raise ValueError("after_drift: attenuate trains past the drift point: set cut: none and w_base above 0")
        return self
