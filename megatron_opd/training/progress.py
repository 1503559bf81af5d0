"""A run's progress in a terminal or a log, for a person to read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress:
    """A live bar in a terminal; one plain line a step in a log, and for a run that has a label."""

    def __init__(self, steps: int, done: int, label: str = "", console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.steps = steps
        self.prefix = f"{label}: " if label else ""
        self.bar: Progress | None = None
        if self.console.is_terminal and not label:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps, completed=done)
            self.bar.start()

    def step(self, values: dict[str, Any]) -> None:
        overlap = values["overlap_mean"]
        parts = [
            f"loss {values['loss']:.4f}",
            f"overlap {overlap:.3f}" if overlap is not None else "",
            f"effective {values['effective_length_mean']:.0f}",
            f"budget {values['budget']}",
            f"tokens {values['tokens_generated']}/{values['tokens_trained']}",
            f"{values['step_s']:.2f}s",
            f"ALARM {', '.join(values['alarms'])}" if values.get("alarms") else "",
            values.get("warning", ""),
        ]
        line = "  ".join(p for p in parts if p)
        if self.bar is not None:
            self.bar.update(self.task, completed=values["step"], description=line)
        else:
            self.say(f"step {values['step']}/{self.steps}  {line}")

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        with suppress(OSError):  # a log on a full disk must not end the run
            console = self.bar.console if self.bar is not None else self.console
            console.print(self.prefix + text, markup=False, highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
