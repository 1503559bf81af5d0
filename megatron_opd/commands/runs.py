"""`megatron-opd runs DIR`: one line for each run in a folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_opd.commands.terminal import duration, number, visible
from megatron_opd.errors import InputError
from megatron_opd.records.run_folder import RunFolder, find_runs

HEAD = ("run", "state", "step", "accuracy", "loss", "time", "last alarm", "job")


def runs(folder: str, console: Console | None = None) -> None:
    """Raises InputError where there is none."""
    folders = find_runs(Path(folder))
    if not folders:
        raise InputError(f"{folder}: holds no run (a folder with metrics.jsonl or config.yaml)")
    console = console or Console()
    lines = [line_of(run) for run in folders]
    if not console.is_terminal:  # a log, or a pipe: columns by width, nothing cut
        widths = [max(len(line[i]) for line in (HEAD, *lines)) for i in range(len(HEAD))]
        for line in (HEAD, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*(cell.replace("[", r"\[") for cell in line))
    console.print(table)


def line_of(run: RunFolder) -> tuple[str, ...]:
    """The run's line, as texts in the order of HEAD."""
    steps = run.steps
    accuracy = ", ".join(f"{name} {100 * value:.1f}%" for name, value in run.accuracy.items())
    seconds = [step["step_s"] for step in steps if isinstance(step.get("step_s"), int | float)]
    alarms = [
        (step["step"], step["alarms"]) for step in steps if isinstance(step.get("alarms"), list) and step["alarms"]
    ]
    last = f"{', '.join(map(str, alarms[-1][1]))} at {alarms[-1][0]}" if alarms else "–"
    cells = (
        run.name,
        run.state,
        f"{run.last_step}/{run.wanted_steps or '?'}",
        accuracy or "–",
        number(steps[-1].get("loss") if steps else None),
        duration(sum(seconds)) if seconds else "–",
        last,
        run.job or "–",
    )
    return tuple(visible(cell).replace("\n", " ") for cell in cells)
