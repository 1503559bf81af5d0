"""Scores responses in separate processes, so that one that hangs or crashes costs a verdict and not the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.errors import RunError
from megatron_opd.evaluation.worker import THINKING, opened_thinking
from megatron_opd.types import Prompt, Rollout

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT_S = 120.0
_MARK = "MEGATRON_OPD_VERIFIER"


class VerifierError(RunError):
    """A verifier cannot be started at all, for instance because its package is missing."""


@dataclass(frozen=True)
class Case:
    """One response to score."""

    response: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    opened: str = ""  # the marker of thinking that the prompt ends with

    @classmethod
    def of(cls, prompt: Prompt, response: str) -> Case:
        """A response to a prompt."""
        return cls(response, prompt.answer or "", prompt.metadata, prompt.source, opened_thinking(prompt.text))


@dataclass(frozen=True)
class Verdict:
    """`score` from 0 to 1; `problem` says why a response could not be judged and so counts as wrong."""

    score: float
    extracted: str | None = None
    problem: str | None = None

    @property
    def correct(self) -> bool:
        """The full score; reasoning-gym's partial credit is not a right answer."""
        return self.score >= 1.0


class VerifierPool:
    """Worker processes for one verifier: math, reasoning_gym, exact or MODULE:FUNCTION.

    They start with the first use and stay until `close`; one that misses its time limit or dies is replaced. Works from
    any thread and leaves signal handlers alone.
    """

    def __init__(self, verifier: str, timeout_s: float = 10.0, workers: int = 2):
        self.verifier = verifier
        self.timeout_s = timeout_s
        self._workers = [_Worker(verifier) for _ in range(workers)]

    def start(self) -> None:
        """Starts one worker. Raises VerifierError where the verifier cannot be started."""
        self._workers[0].start()

    def score(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict per case, in order. Raises VerifierError where the verifier cannot be started."""
        verdicts: list[Verdict | None] = [None] * len(cases)
        pending = iter(range(len(cases)))
        take = threading.Lock()
        failures: list[BaseException] = []

        def work(worker: _Worker) -> None:
            while not failures:
                with take:
                    i = next(pending, None)
                if i is None:
                    return
                try:
                    verdicts[i] = worker.score(cases[i], self.timeout_s)
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in self._workers[: len(cases)]]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt: no further cases
            failures.append(error)
            raise
        if failures:
            raise failures[0]
        return [v for v in verdicts if v is not None]

    def close(self) -> None:
        """Ends the worker processes."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def response_text(rollout: Rollout, tokenizer: Tokenizer) -> str:
    """What verifiers and people read: the response's text without control pieces, but with the marks of thinking, which
    are control pieces to some tokenizers."""
    return tokenizer.decode(rollout.tokens.tolist(), keep="".join(begin + end for begin, end in THINKING))


def reference_verdicts(prompts: Sequence[Prompt], pool: VerifierPool) -> list[Verdict]:
    """What the verifier says of each prompt's own reference answer."""
    form = "<answer>{}</answer>" if pool.verifier != "math" else "\\boxed{{{}}}"
    return pool.score([Case(form.format(p.answer), p.answer or "", p.metadata, p.source) for p in prompts])


def reference_problems(prompts: Sequence[Prompt], pool: VerifierPool) -> list[str]:
    """Checks that the reference answers can be verified: each must count as right when it is given as the answer, and
    math-verify must be able to read it, or answers that are written differently would all be wrong.

    Prompts without a reference answer (some of reasoning-gym's) are passed over. Returns one line per finding.
    """
    asked = [p for p in prompts if p.answer is not None]
    findings = {}
    for prompt, verdict in zip(asked, reference_verdicts(asked, pool)):
        if not verdict.correct:
            reason = verdict.problem or f"it does not count as right itself (score {verdict.score:g})"
            findings[prompt.uid] = f"prompt {prompt.uid}, reference answer {prompt.answer!r}: {reason}"
    if pool.verifier == "math":  # equal text is right unread: show it another one
        others = [Case("\\boxed{-271828182}", p.answer or "") for p in asked]
        for prompt, verdict in zip(asked, pool.score(others)):
            if verdict.problem is not None:
                findings[prompt.uid] = f"prompt {prompt.uid}: {verdict.problem}"
    return list(findings.values())


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    """Kills every process of this user whose environment holds the mark."""
    wanted = f"{_MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # ended by now, or another user's
                if wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry), signal.SIGKILL)


class _Worker:
    """One worker process; it is started when needed and killed when late."""

    def __init__(self, verifier: str):
        self.verifier = verifier
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._mark = uuid.uuid4().hex  # in the environment of the worker and of whatever it starts

    def score(self, case: Case, timeout_s: float) -> Verdict:
        connection = self.start()
        message = ("score", timeout_s, case.response, case.answer, case.metadata, case.source, case.opened)
        try:
            connection.send(message)
        except OSError:  # it died after its last verdict: not this case's fault
            self.stop()
            connection = self.start()
            connection.send(message)
        except Exception as error:  # pickle raises several types
            return Verdict(0.0, problem=f"the prompt's metadata cannot be sent to the verifier: {error}")
        try:
            if not connection.poll(timeout_s):
                self.stop(grace_s=0)
                return Verdict(0.0, problem=f"the verifier took longer than {timeout_s:g} s")
            kind, content = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return Verdict(0.0, problem=f"the verifier's process died ({self.stop()})")
        except ValueError:
            self.stop(grace_s=0)
            return Verdict(0.0, problem="the verifier wrote something else than its verdict to its connection")
        return Verdict(*content) if kind == "scored" else Verdict(0.0, problem=f"the verifier failed: {content}")

    def start(self) -> Connection:
        """The connection to the running process, which is started where there is none."""
        if self._connection is not None:
            return self._connection
        ours, theirs = Pipe()
        # A process of its own: multiprocessing's spawn would import the training script again. -P: the worker's folder
        # holds modules with common names that must not shadow others.
        command = [sys.executable, "-P", str(WORKER), str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", _MARK: self._mark},
                start_new_session=True,
            )
        self._process, self._connection = process, ours
        try:
            ours.send(("load", self.verifier, sys.path))
            if not ours.poll(START_TIMEOUT_S):
                self.stop(grace_s=0)
                raise VerifierError(f"verifier {self.verifier} did not start within {START_TIMEOUT_S:g} s")
            kind, content = json.loads(ours.recv_bytes())
        except (EOFError, OSError):
            raise VerifierError(f"verifier {self.verifier} died while starting ({self.stop()})") from None
        if kind != "ready":
            self.stop()
            raise VerifierError(f"verifier {self.verifier} cannot start: {content}")
        return ours

    def stop(self, grace_s: float = 1.0) -> str:
        """Ends the process, by force after `grace_s`, and says how it ended."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return "not running"
        try:
            code = process.wait(timeout=grace_s)  # closing the connection ends an idle one
            idle = code == 0
        except subprocess.TimeoutExpired:
            idle = False
            _kill_group(process.pid)
            code = process.wait()
        if not idle:  # a verifier that hung or died may have left processes, also in sessions of their own
            _kill_group(process.pid)
            _kill_marked(self._mark)
        return f"signal {-code}" if code < 0 else f"exit code {code}"
