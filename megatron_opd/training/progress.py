"""A run's progress in a terminal or a log, for a person to read."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOOK_S = 0.1  # between two updates of the responses' bar


class StepProgress:
    """In a terminal two live bars, of the steps and of the phase that the step is in; in a log, and for a run that has
    a label, one plain line a step, whose numbers line up."""

    def __init__(self, steps: int, done: int, label: str = "", console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.steps = steps
        self.prefix = f"{label}: " if label else ""
        self.bar: Progress | None = None
        self._seconds: list[float] = []
        self._began, self._next_look = 0.0, 0.0
        if self.console.is_terminal and not label:
            columns = (
                TextColumn("{task.fields[what]:>8}"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=done, what="step")
            self.phase_task = self.bar.add_task("", total=None, visible=False, what="")
            self.bar.start()

    def phase(self, name: str) -> None:
        """A phase of the step has begun; "": none goes on."""
        if self.bar is not None:
            self._began = time.monotonic()
            self.bar.remove_task(self.phase_task)
            self.phase_task = self.bar.add_task("", total=None, visible=bool(name), what=name)

    def responses(self, ended: int, of: int, tokens: int) -> None:
        """While responses are generated: how many have ended, and tokens that were sampled."""
        now = time.monotonic()
        if self.bar is None or (now < self._next_look and ended < of):
            return
        self._next_look = now + LOOK_S
        speed = tokens / max(now - self._began, 1e-3)
        text = f"responses ended, {tokens:,} tokens, {speed:,.0f}/s"
        self.bar.update(self.phase_task, total=of, completed=ended, description=text)

    def step(self, values: dict[str, Any]) -> None:
        overlap = values["overlap_mean"]
        self._seconds = [*self._seconds[-19:], values["step_s"]]
        left = (self.steps - values["step"]) * sum(self._seconds) / len(self._seconds)
        parts = [
            f"loss {values['loss']:9.4f}",
            f"overlap {overlap:.3f}" if overlap is not None else "",
            f"effective {values['effective_length_mean']:6.0f}",
            f"budget {values['budget']:6}",
            f"tokens {values['tokens_generated']:>9}/{values['tokens_trained']:<9}",
            f"{values['step_s']:7.2f}s",
            f"{_short(left):>6} left" if left and self.bar is None else "",
            f"ALARM {', '.join(values['alarms'])}" if values.get("alarms") else "",
            values.get("warning", ""),
        ]
        if self.bar is not None:
            line = "  ".join(" ".join(p.split()) for p in parts if p)
            self.bar.update(self.task, completed=values["step"], description=line)
            self.phase("")
        else:
            number = f"{values['step']:{len(str(self.steps))}}"
            self.say(f"step {number}/{self.steps}  {'  '.join(p for p in parts if p)}")

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        with suppress(OSError):  # a log on a full disk must not end the run
            console = self.bar.console if self.bar is not None else self.console
            console.print(self.prefix + text, markup=False, highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _short(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 60:.0f}min" if seconds >= 100 else f"{seconds:.0f}s"
