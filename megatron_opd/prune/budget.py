"""The response budget: how many tokens the next step may generate, one number for the whole run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_SETTINGS = ("initial", "minimum", "maximum", "step", "margin", "hit_ratio", "patience")
_STATE = ("current", "no_hit_steps", "last_hit_ratio")


class ResponseBudget:
    """Prune-OPD's controller of the response budget M (docs/method.md item 6), in tokens.

    boundary = max(minimum, M - margin); the hit ratio h is the share of the batch's responses whose effective length
    reaches the boundary. Where h >= hit_ratio, M grows by `step` up to `maximum` and the counter starts over; otherwise
    the counter grows, and when it reaches `patience`, M shrinks by `step` down to `minimum` and the counter starts
    over.

    Departure from the released code: budget and counter are part of the checkpoint (`state_dict`), so that a resumed
    run goes on instead of starting over at `initial`.
    """

    def __init__(
        self,
        initial: int,
        minimum: int,
        maximum: int,
        step: int = 100,
        margin: int = 100,
        hit_ratio: float = 0.1,
        patience: int = 3,
    ) -> None:
        """Raises ValueError naming the argument where the bounds do not hold 1 <= minimum <= initial <= maximum."""
        if not 1 <= minimum <= initial <= maximum:
            raise ValueError(
                f"the budget needs 1 <= minimum <= initial <= maximum, got minimum {minimum}, initial {initial}, "
                f"maximum {maximum}"
            )
        for name, value, least in (("step", step, 1), ("margin", margin, 0), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < hit_ratio <= 1:
            raise ValueError(f"hit_ratio must lie in (0, 1], got {hit_ratio}")
        self.initial = initial
        self.minimum = minimum
        self.maximum = maximum
        self.step = step
        self.margin = margin
        self.hit_ratio = hit_ratio
        self.patience = patience
        self.current = initial
        self.no_hit_steps = 0
        self.last_hit_ratio: float | None = None

    @property
    def boundary(self) -> int:
        """Effective length, in tokens, from which a response counts as having hit the budget."""
        return max(self.minimum, self.current - self.margin)

    def measure(self, effective_lengths: Tensor | Iterable[float]) -> float:
        """The hit ratio of a batch against the current boundary; the batch is the global one, on every rank.

        effective_lengths [responses], in tokens. Raises ValueError on an empty batch.
        """
        if isinstance(effective_lengths, Tensor):
            effective_lengths = effective_lengths.flatten().tolist()
        lengths = list(effective_lengths)
        if not lengths:
            raise ValueError("effective_lengths is empty: the budget needs the responses of the whole batch")
        return sum(length >= self.boundary for length in lengths) / len(lengths)

    def update(self, effective_lengths: Tensor | Iterable[float]) -> int:
        """Moves the budget by the batch's effective lengths [responses]; returns the next step's budget."""
        return self.update_from_hit_ratio(self.measure(effective_lengths))

    def update_from_hit_ratio(self, h: float) -> int:
        """Moves the budget by a hit ratio measured elsewhere; returns the next step's budget."""
        h = float(h)
        if not 0 <= h <= 1 or math.isnan(h):
            raise ValueError(f"the hit ratio must lie in 0..1, got {h}")
        self.last_hit_ratio = h
        if h >= self.hit_ratio:
            self.current = min(self.current + self.step, self.maximum)
            self.no_hit_steps = 0
            return self.current
        self.no_hit_steps += 1
        if self.no_hit_steps >= self.patience:
            self.current = max(self.current - self.step, self.minimum)
            self.no_hit_steps = 0
        return self.current

    def state_dict(self) -> dict[str, Any]:
        """Settings and state, plain numbers."""
        return {name: getattr(self, name) for name in (*_SETTINGS, *_STATE)}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Goes on where `state_dict` was taken, within this object's own settings: whoever resumes with another maximum
        means it.

        Returns the settings that differ, as "maximum 4096 -> 2048", saved and own. Raises ValueError where keys are
        missing or unknown, or the saved values contradict each other.
        """
        expected = set(_SETTINGS) | set(_STATE)
        if set(state) != expected:
            raise ValueError(
                f"budget state: missing {sorted(expected - set(state))}, unknown {sorted(set(state) - expected)}"
            )
        if not state["minimum"] <= state["current"] <= state["maximum"]:
            raise ValueError(f"budget state: current {state['current']} outside {state['minimum']}..{state['maximum']}")
        if not 0 <= state["no_hit_steps"] < state["patience"]:
            raise ValueError(f"budget state: no_hit_steps {state['no_hit_steps']} outside 0..{state['patience'] - 1}")
        self.current = min(max(state["current"], self.minimum), self.maximum)
        self.no_hit_steps = min(state["no_hit_steps"], self.patience - 1)
        self.last_hit_ratio = state["last_hit_ratio"]
        return [f"{n} {state[n]} -> {getattr(self, n)}" for n in _SETTINGS if getattr(self, n) != state[n]]


class StaircaseBudget(ResponseBudget):
    """Grows by `step` after every `patience` steps, whatever the responses are (POPD, arXiv 2605.31490; Prefix OPD).

    With `initial` H_0: min(maximum, H_0 + step floor(k / patience)) at step k = 0, 1, ...
    """

    def update_from_hit_ratio(self, h: float) -> int:
        self.last_hit_ratio = float(h)
        self.no_hit_steps += 1  # here: steps on this stair
        if self.no_hit_steps >= self.patience:
            self.current, self.no_hit_steps = min(self.current + self.step, self.maximum), 0
        return self.current
