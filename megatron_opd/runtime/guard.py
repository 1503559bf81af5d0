"""What ends a run in good order: stop signals, a watchdog over its steps, and the lock of its directory.

Exit codes: REQUEUE_EXIT_CODE (75, EX_TEMPFAIL) after SIGTERM or SIGUSR1, with the run saved; WATCHDOG_EXIT_CODE (76)
where a step hung. Both mean that starting the same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.errors import RunError, describe
from megatron_opd.parallel.collective import on_rank_0
from megatron_opd.runtime.launch import FORWARDED, REQUEUE_EXIT_CODE, WATCHDOG_EXIT_CODE
from megatron_opd.runtime.lock import HEARTBEAT_S, RunLock, RunLocked

__all__ = ["REQUEUE_EXIT_CODE", "WATCHDOG_EXIT_CODE", "Guard", "Requeue"]

_STDERR = 2  # the descriptor: a rank's log, whatever has become of sys.stderr
_LOOK_S = 0.5  # how often the thread looks at the clock
_LAST_WORDS_S = 3.0  # between a rank's stacks and its end, so that the other ranks write theirs
_BACKSTOP_S = 10.0  # after the limit: for a main thread that holds Python's lock
_TERM_PATIENCE_S = 10.0  # a rank that is still in its step so long after SIGTERM says where


class Requeue(RunError):
    """The run was asked to stop and has saved; started again, it goes on."""

    exit_code = REQUEUE_EXIT_CODE


class Guard:
    """One per process. Made and closed collectively; `asked_to_leave` is collective too."""

    def __init__(self, run_dir: str, limit_s: float) -> None:
        """Takes the run directory's lock. Raises RunLocked on every rank where another job has it."""
        self.limit_s = limit_s
        self.lock: RunLock | None = None
        self._signal = 0
        self._deadline: float | None = None
        self._doing = ""
        self._term_at: float | None = None
        self._take_lock(run_dir)
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.settimeout(_LOOK_S)
        self._previous: dict[int, Any] = {n: signal.signal(n, self._on_signal) for n in FORWARDED}
        # The main thread may be stuck in C, where Python's handlers do not run; the thread hears of signals by this.
        self._previous_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._open = True
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The step that runs inside must end within the limit; else every rank writes its stacks and ends."""
        self._doing = f"step {number}"
        self._deadline = time.monotonic() + self.limit_s
        faulthandler.dump_traceback_later(self.limit_s + _BACKSTOP_S, exit=True, file=_STDERR)
        try:
            yield
        finally:
            self._deadline = None
            faulthandler.cancel_dump_traceback_later()

    def asked_to_leave(self) -> str:
        """The name of the signal that any rank has received, or empty. Collective.

        Raises RunLocked where another job has taken over the run directory: two must not write to it.
        """
        lost = self.lock is not None and self.lock.lost
        asked = torch.tensor([self._signal, int(lost)])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        number, lost_somewhere = asked.tolist()
        if lost_somewhere:
            raise RunLocked("another job has taken over the run directory; this one stops without saving")
        return signal.Signals(number).name if number else ""

    @property
    def note(self) -> str:
        """What is worth telling about the directory's previous owner; on the rank that holds the lock."""
        return self.lock.taken_from if self.lock is not None else ""

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._deadline = None
        self._wake.send(b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._wake.close()
        self._woken.close()
        if self.lock is not None:
            self.lock.release()

    def _take_lock(self, run_dir: str) -> None:
        def take() -> None:
            try:
                self.lock = RunLock(run_dir)
            except OSError as error:
                raise RunLocked(f"cannot lock {run_dir}: {describe(error)}") from error

        on_rank_0(take)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = max(self._signal, number)

    def _watch(self) -> None:
        beat_at = time.monotonic()
        while self._open:
            with suppress(TimeoutError):  # not select(), which refuses descriptors beyond 1023
                if signal.SIGTERM in self._woken.recv(64):
                    self._term_at = time.monotonic()
            now = time.monotonic()
            if self.lock is not None and now >= beat_at:
                beat_at = now + HEARTBEAT_S
                self.lock.beat()
            deadline = self._deadline
            if self._term_at is not None and now > self._term_at + _TERM_PATIENCE_S:
                self._term_at = None
                if deadline is not None:
                    self._write_stacks(f"still in {self._doing} {_TERM_PATIENCE_S:.0f} s after SIGTERM")
            if deadline is not None and now > deadline:
                self._write_stacks(f"{self._doing} has taken more than train.watchdog_s: {self.limit_s} s; ending")
                time.sleep(_LAST_WORDS_S)
                os._exit(WATCHDOG_EXIT_CODE)

    def _write_stacks(self, reason: str) -> None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        speaker = f"rank {rank} of {world} (host {socket.gethostname()}, process {os.getpid()})"
        os.write(_STDERR, f"\nmegatron-opd: {speaker}: {reason}\n".encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
