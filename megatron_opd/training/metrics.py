"""Where a run's numbers go: metrics.jsonl, TensorBoard, and progress that a person reads."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PHASES = ("rollout", "score", "cut", "train", "sync")


class PhaseClock:
    """Seconds of each phase of a step; a phase inside another one is taken off the outer one."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._stack: list[str] = []
        self._mark = self.started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._stack.append(name)
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

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


class MetricsLog:
    """RUN/metrics.jsonl, one object a step, and TensorBoard beside it. Only the writing rank has one."""

    def __init__(self, run_dir: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(run_dir, "metrics.jsonl")
        self._drop_from(first_step)
        self.descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._unwritten: list[str] = []
        self.board: SummaryWriter | None = SummaryWriter(str(Path(run_dir, "tensorboard")), purge_step=first_step)

    def _drop_from(self, step: int) -> None:
        """After a resume, steps behind the checkpoint are run again: their old lines go, and a torn last line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        scratch = self.path.with_suffix(".jsonl.tmp")
        scratch.write_text("".join(kept), encoding="utf-8")
        os.replace(scratch, self.path)

    def write(self, values: dict[str, Any]) -> str:
        """Adds a step's line; returns what is wrong with the disk, if anything.

        Lines that could not be written are kept and written with a later one.
        """
        self._unwritten.append(json.dumps(values) + "\n")
        problem = self._write_lines()
        for name, value in values.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    self._plot(f"{name}/{inner}", number, values["step"])
            elif isinstance(value, int | float) and name != "step":
                self._plot(name, value, values["step"])
        return problem

    def _write_lines(self) -> str:
        while self._unwritten:
            line = self._unwritten[0].encode()
            end = os.lseek(self.descriptor, 0, os.SEEK_END)
            try:
                if os.write(self.descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self.descriptor, end)  # no torn line stays
                return f"{self.path.name} lacks {len(self._unwritten)} line(s): {error.strerror}"
            self._unwritten.pop(0)
        return ""

    def _plot(self, name: str, value: float, step: int) -> None:
        if self.board is not None:
            try:
                self.board.add_scalar(name, value, step)
            except OSError:  # its writing thread has met a full disk and is gone; metrics.jsonl has every number
                self.board = None

    def close(self) -> None:
        self._write_lines()
        os.close(self.descriptor)
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


def was_reported(run_dir: str, step: int) -> bool:
    """Whether RUN/metrics.jsonl has a whole line of this step."""
    path = Path(run_dir, "metrics.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines()[::-1] if path.exists() else ():
        try:
            if json.loads(line)["step"] == step:
                return True
        except (ValueError, KeyError):
            continue
    return False


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


def step_metrics(step: int, clock: PhaseClock, batch: Any, budget: Any, hit_ratio: float, used: int) -> dict[str, Any]:
    """The design's numbers of one step that follow from its scored batch. `used`: the budget it was generated with."""
    rollouts, scores, lengths = batch.rollouts, batch.scores, batch.effective_length
    overlap = float(torch.cat([s.overlap for s in scores]).nanmean())
    if batch.reverse_kl is not None:
        divergence = sum(float(d.sum()) for d in batch.reverse_kl)
    else:
        divergence = sum(
            float((r.topk_logprobs.softmax(-1) * (r.topk_logprobs - s.logprobs)).sum())
            for r, s in zip(rollouts, scores)
        )
    tokens = sum(len(r) for r in rollouts)
    judged = sum(int((~s.overlap.isnan()).sum()) for s in scores)  # 0: the signal needs no overlap
    return {
        "step": step,
        "step_s": clock.total,
        **{f"{name}_s": seconds for name, seconds in clock.seconds.items()},
        "tokens_generated": tokens,
        "tokens_trained": sum(batch.kept_length),
        "response_length_mean": tokens / len(rollouts),
        "overlap_mean": None if math.isnan(overlap) else overlap,
        "events_mean": sum(batch.events) / len(rollouts),
        "effective_length_mean": sum(lengths) / len(lengths),
        "effective_length_max": max(lengths),
        "ended": {reason: sum(r.end_reason == reason for r in rollouts) for reason in ("eos", "length", "drift")},
        "hit_ratio": hit_ratio,
        "budget": used,
        "budget_next": budget.current,
        "no_hit_steps": budget.no_hit_steps,
        "reverse_kl": divergence / (judged or tokens),
    }
