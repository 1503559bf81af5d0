"""Whether the responses that a step trains on are chosen by their length: those that end early are trained on early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WINDOW = 32  # steps that are looked back
FIRST = 8  # steps before anything is said
APART = 0.8  # mean length of trained over started responses, below which it is said


class Lengths:
    """Lengths of the responses of the last WINDOW steps: those that were started in them, and those trained on."""

    def __init__(self) -> None:
        self.started: dict[int, list[int]] = {}  # by step: responses, and tokens of those that were trained on since
        self.trained: dict[int, list[int]] = {}  # by step: responses and tokens
        self.warning, self.warned = "", False

    def start(self, step: int, responses: int) -> None:
        self.started[step], self.trained[step] = [responses, 0], [0, 0]
        for numbers in (self.started, self.trained):
            for old in [s for s in numbers if s <= step - WINDOW]:
                del numbers[old]

    def train(self, step: int, started: int, tokens: int) -> None:
        self.trained[step][0] += 1
        self.trained[step][1] += tokens
        if started in self.started:
            self.started[started][1] += tokens

    def metrics(self, step: int, under_way: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """length_started: mean of the responses that were started, with what there is of them; length_trained: of those
        that were trained on. `under_way`: the step that has started it and tokens so far, of each response."""
        begun = sum(tokens for started, tokens in under_way if started in self.started)
        started = [sum(column) for column in zip(*self.started.values())]
        trained = [sum(column) for column in zip(*self.trained.values())]
        mean_started = (started[1] + begun) / started[0] if started[0] else None
        mean_trained = trained[1] / trained[0] if trained[0] else None
        metrics = {"length_started": mean_started, "length_trained": mean_trained}
        if mean_started and mean_trained and mean_trained < APART * mean_started and step >= FIRST and not self.warned:
            self.warned = True
            self.warning = (
                f"responses that were trained on have {mean_trained:.0f} tokens on average, those that were started "
                f"{mean_started:.0f}: rollout.carry_over trains on short ones first; lower rollout.oversubscribe or "
                "rollout.max_version_lag"
            )
        return metrics

    def take_warning(self) -> str:
        """What is to be said, once in a run; empty before and after."""
        warning, self.warning = self.warning, ""
        return warning

    def state_dict(self) -> dict[str, Any]:
        columns = {"started": self.started, "trained": self.trained}
        return {name: [[s, *v] for s, v in column.items()] for name, column in columns.items()} | {
            "warned": self.warned
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = {s: list(numbers) for s, *numbers in state["started"]}
        self.trained = {s: list(numbers) for s, *numbers in state["trained"]}
        self.warned = state["warned"]
