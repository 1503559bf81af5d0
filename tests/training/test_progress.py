"""What a person sees of a run: lines that line up in a log, live bars in a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from megatron_opd.training.clock import PhaseClock
from megatron_opd.training.progress import StepProgress
from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases


def values(step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 0.5 * step, "overlap_mean": 0.5, "effective_length_mean": 10.0**step, "budget": 64}
    return line | {"tokens_generated": 10**step, "tokens_trained": 7, "step_s": 2.0} | more


def test_a_log_has_one_line_a_step_whose_numbers_line_up() -> None:
    console = Console(file=io.StringIO(), soft_wrap=True)
    progress = StepProgress(200, 0, console=console)
    for step in (1, 2, 4):
        progress.phase("rollout")
        progress.responses(1, 2, 30)
        progress.step(values(step))
    progress.step(values(5, alarms=["lengths"], warning="SAVING FAILS"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4 and lines[0].startswith("step   1/200  loss    0.5000")
    for mark in ("loss", "overlap", "effective", "budget", "tokens", "/7", "s  ", " left"):
        assert len({line.index(mark) for line in lines}) == 1, mark
    assert "7min left" in lines[0] and lines[3].endswith("ALARM lengths  SAVING FAILS")


def test_time_left_follows_the_last_steps() -> None:
    console = Console(file=io.StringIO(), soft_wrap=True)
    progress = StepProgress(103, 0, console=console)
    progress.step(values(1, step_s=100.0))
    progress.step(values(3, step_s=44.0))
    assert re.findall(r"(\S+) left", console.file.getvalue()) == ["2.8h", "2.0h"]  # type: ignore[attr-defined]


def test_a_terminal_has_a_bar_of_the_steps_and_one_of_the_phase() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    progress = StepProgress(4, 1, console=console)
    assert progress.bar is not None
    clock = PhaseClock(progress.phase)
    with clock.phase("rollout"):
        progress.responses(3, 12, 5000)
        task = progress.bar.tasks[1]
        assert task.visible and (task.fields["what"], task.completed, task.total) == ("rollout", 3, 12)
        assert "5,000 tokens" in task.description
        with clock.phase("score"):  # in flight, the teacher reads in between
            assert progress.bar.tasks[1].fields["what"] == "rollout" and progress.bar.tasks[1].total == 12
    with clock.phase("train"):
        assert progress.bar.tasks[1].fields["what"] == "train" and progress.bar.tasks[1].total is None
    progress.step(values(2))
    assert not progress.bar.tasks[1].visible and progress.bar.tasks[0].completed == 2
    progress.close()


def listen(rank: int, world: int, folder: Any, cases: list[Case]) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Runs the cases; what rank 0 hears of their responses."""
    heard: list[tuple[int, int, int]] = []
    StepProgress.responses = lambda self, *numbers: heard.append(numbers)  # type: ignore[method-assign,assignment]
    return [outcome.error for outcome in run_cases(rank, world, folder, cases)], heard


@pytest.mark.parametrize("overrides", [(), ("prune.preset=in_flight",)])
def test_the_engine_tells_how_many_responses_have_ended(tmp_path: Any, overrides: tuple[str, ...]) -> None:
    run = TinyRun(tmp_path, train={"steps": 1, "warmup_steps": 0}, checkpoint={"every": 0}, prune={"segment": 4})
    errors, heard = run_distributed(2, listen, run.folder, [Case("told", overrides)])[0]
    assert errors == [""] and len(heard) > 4
    ended, of, tokens = zip(*heard)
    assert set(of) == {4} and ended[-1] == 4 and list(ended) == sorted(ended) and list(tokens) == sorted(tokens)
    (step,) = run.metrics(run.folder / "told")
    assert tokens[-1] == step["tokens_generated"]
