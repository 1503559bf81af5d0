"""A run's numbers on disk and on their way to the trackers that `logging` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.records.lines import METRICS, StepLines, read_steps
from megatron_opd.trackers.base import Guarded, Tracker, flat_numbers


def add_warning(metrics: dict[str, Any], text: str) -> None:
    """Adds to what a step's line warns of."""
    if text:
        metrics["warning"] = "; ".join(filter(None, (metrics.get("warning"), text)))


class MetricsLog:
    """RUN/metrics.jsonl, one object a step, and trackers beside it. Only the writing rank has one.

    Trackers are views of what metrics.jsonl holds: where one fails, the run goes on without it.
    """

    def __init__(self, run_dir: str, first_step: int, trackers: Sequence[Guarded] = ()) -> None:
        self.lines, self.trackers = StepLines(Path(run_dir, METRICS), first_step), trackers

    def write(self, values: dict[str, Any]) -> str:
        """Adds a step's line; returns what is wrong with the disk, if anything. When a tracker has failed, the next
        line says so once, as its `warning`."""
        step, numbers = values["step"], flat_numbers(values)
        self.send(lambda tracker: tracker.numbers(step, numbers))
        for tracker in self.trackers:
            add_warning(values, tracker.take_warning())
        return self.lines.add(values)

    def send(self, act: Callable[[Tracker], None]) -> None:
        """Does it on every tracker, later and elsewhere."""
        for tracker in self.trackers:
            tracker.send(act)

    def close(self) -> None:
        self.lines.close()
        for tracker in self.trackers:
            if warning := tracker.close():
                print(f"WARNING: {warning}", flush=True)


def was_reported(run_dir: str, step: int) -> bool:
    """Whether RUN/metrics.jsonl has a whole line of this step."""
    path = Path(run_dir, METRICS)
    return path.exists() and any(values["step"] == step for values in read_steps(path))
