"""Where the seconds of a step go. Needs nothing beside the standard library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("rollout", "score", "cut", "train", "sync")
PHASE_KEYS = tuple(f"{phase}_s" for phase in PHASES)  # in metrics.jsonl


class PhaseClock:
    """Seconds of each phase of a step; a phase inside another one is taken off the outer one."""

    def __init__(self, begins: Callable[[str], None] | None = None) -> None:
        """begins: hears of each phase that begins, but for those inside another one."""
        self.begins = begins
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._stack: list[str] = []
        self._mark = self.started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._stack.append(name)
        if self.begins is not None and len(self._stack) == 1:
            self.begins(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def metrics(self) -> dict[str, float]:
        """Seconds of the step so far, and of each of its phases."""
        return {"step_s": time.perf_counter() - self.started, **dict(zip(PHASE_KEYS, self.seconds.values()))}
