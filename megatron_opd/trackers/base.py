"""What a tracker is, and what keeps one from slowing or ending a run."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opd.files import write_whole

WAITING = 1000  # messages that a tracker may lag behind; later ones are left out
CLOSE_S = 30.0  # that the end of a run waits for a tracker
IDS = "trackers.json"  # RUN/trackers.json: the run's id with each service
_IDS_LOCK = threading.Lock()


@dataclass
class TrackerSetup:
    """What a tracker is opened with."""

    run_dir: str
    project: str
    name: str
    config: dict[str, Any]  # the run's whole config, for JSON
    first_step: int
    notes: dict[str, str] = field(default_factory=dict)  # git revision, job

    def known_id(self, tracker: str) -> str | None:
        """The run's id with this service, where the run goes on."""
        return _read_ids(self.run_dir).get(tracker)

    def remember_id(self, tracker: str, value: str) -> str:
        """Keeps it for the next start of this run, and returns it. Raises OSError."""
        with _IDS_LOCK:  # trackers are opened side by side
            ids = _read_ids(self.run_dir) | {tracker: value}
            write_whole(Path(self.run_dir, IDS), [json.dumps(ids, indent=2) + "\n"])
        return value

    def own_id(self, tracker: str) -> str:
        """The known one, or one of 20 hexadecimal digits that is the run's from now on. Raises OSError."""
        return self.known_id(tracker) or self.remember_id(tracker, uuid.uuid4().hex[:20])


class Tracker(ABC):
    """One service, opened with a `TrackerSetup`. All of its methods are called in one thread, in order, and may raise
    whatever they like: the tracker then gets nothing more, and the run goes on with a warning."""

    @abstractmethod
    def __init__(self, setup: TrackerSetup) -> None: ...

    @abstractmethod
    def numbers(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers; those of inner objects by NAME/INNER."""

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Responses, as text."""

    def artifact(self, name: str, path: Path) -> None:
        """A file or folder to keep."""

    def close(self) -> None:
        """Writes out what is left."""


def flat_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a step's line; those of inner objects by NAME/INNER."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not (name == "step" and not prefix):
            numbers[prefix + name] = value
    return numbers


class Guarded:
    """A tracker in a thread of its own. Whatever happens to it costs one warning."""

    def __init__(self, label: str, make: Callable[[], Tracker]) -> None:
        self.label = label
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._warning = ""
        self._failed = self._full = False
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name=f"tracker {label}")
        self._thread.start()

    def _run(self, make: Callable[[], Tracker]) -> None:
        tracker: Tracker | None = None
        try:
            tracker = make()
            while (act := self._queue.get()) is not None:
                act(tracker)
            tracker.close()
        except BaseException as error:  # a client of another project: whatever it raises, SystemExit included
            self._failed = True
            kind, text = type(error).__name__, " ".join(str(error).split())[:300]
            self._warning = (
                f"no {self.label}: {kind}: {text}"
                if tracker is None
                else f"{self.label} has failed and gets nothing more: {kind}: {text}"
            )

    def send(self, act: Callable[[Tracker], None]) -> None:
        """Returns at once."""
        if self._failed:
            return
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            if not self._full:
                self._warning = f"{self.label} is {WAITING} messages behind: some are left out"
            self._full = True

    def take_warning(self) -> str:
        warning, self._warning = self._warning, ""
        return warning

    def settle(self, seconds: float) -> None:
        """Waits until what was sent is written, the tracker has failed, or the time is over."""
        end = time.monotonic() + seconds
        done = threading.Event()
        self.send(lambda _: done.set())
        while not done.wait(0.01) and not self._failed and time.monotonic() < end:
            pass

    def close(self, seconds: float = CLOSE_S) -> str:
        """Returns the last warning, if any."""
        end = time.monotonic() + seconds
        while not self._failed:
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > end:
                    break
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            return f"{self.label} has not answered for {seconds:.0f} s: its last numbers may be missing there"
        return self.take_warning()


def _read_ids(run_dir: str) -> dict[str, str]:
    try:
        ids = json.loads(Path(run_dir, IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in ids.items() if isinstance(v, str)} if isinstance(ids, dict) else {}


def plain_name(text: str) -> str:
    """Letters, digits, dot, dash and underscore alone: what services take as names of metrics and files."""
    return re.sub(r"[^\w.\-/ ]", "_", text)
