"""torchrun in this process: passes stop signals on to the ranks, and the ranks' exit code to the caller.

torchrun itself kills the ranks 30 s after a SIGTERM and turns every exit code into 1. Here SIGTERM and SIGUSR1 are
forwarded; the ranks finish their step, save, and end with REQUEUE_EXIT_CODE of `runtime/guard.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: the run was asked to stop and has saved; start it again to go on
WATCHDOG_EXIT_CODE = 76  # a step hung; start again to go on from the newest checkpoint
ALARM_EXIT_CODE = 4  # train.alarms: stop has ended the run, which is saved; a person has to look at it
# What was given is wrong, the same would happen again, an alarm: starting again does not help.
FINAL_EXIT_CODES = (2, 3, ALARM_EXIT_CODE)
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def torchrun(arguments: list[str]) -> int:
    """Runs torchrun with its own command line's arguments; returns 0, or the exit code that the ranks agree on."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    notices = Notices()
    try:
        run(["--signals-to-handle=SIGINT,SIGHUP", *arguments])
        return 0
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            print(describe_end(rank, failure.exitcode, failure.timestamp), file=sys.stderr, flush=True)
        codes = [failure.exitcode for failure in error.failures.values()]
        return agreed_exit_code(codes, error.get_first_failure()[1].exitcode, notices.received is not None)


class Notices:
    """Forwards stop signals to the ranks, which are this process's children, and remembers that one came."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        import psutil

        self.received = signal.Signals(number)
        for child in psutil.Process().children():
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def describe_end(rank: int, code: int, when: float) -> str:
    """One line on a rank that failed; `code` is negative for a signal, `when` in seconds since the epoch."""
    known = {REQUEUE_EXIT_CODE: ": stopped on request, saved", WATCHDOG_EXIT_CODE: ": a step hung"}
    end = f"exit code {code}{known.get(code, '')}" if code >= 0 else f"{signal.Signals(-code).name}"
    return f"launch: {time.strftime('%T', time.localtime(when))} rank {rank} ended by {end}"


def agreed_exit_code(codes: list[int], first: int, stop_was_asked: bool) -> int:
    """One exit code for the failed ranks' codes; `first` is of the rank that ended first, negative for a signal."""
    final = [code for code in codes if code in FINAL_EXIT_CODES]
    if final:
        return final[0]
    # Ranks that had not begun to listen are ended by the signal itself; nothing is lost by starting again.
    stopped = (REQUEUE_EXIT_CODE, *(-number for number in FORWARDED))
    if first == REQUEUE_EXIT_CODE or (stop_was_asked and all(code in stopped for code in codes)):
        return REQUEUE_EXIT_CODE
    return first if first > 0 else 1


def set_threads(processes: int) -> None:
    """Shares the machine's cores between that many ranks, unless the user has said how."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
