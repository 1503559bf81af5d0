"""`megatron-opd watch RUN`: a run in the terminal as it goes on: curves, phase times, responses, alarms, time left.

It reads the run's files and nothing else, so it works over ssh and on a login node, and the run does not notice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_opd.commands.terminal import coloured, duration, number, sparkline, visible
from megatron_opd.records.reading import read_responses
from megatron_opd.records.run_folder import RunFolder
from megatron_opd.training.clock import PHASES

CURVES = (
    ("loss", "loss"),
    ("reverse KL", "reverse_kl"),
    ("overlap", "overlap_mean"),
    ("effective length", "effective_length_mean"),
    ("budget", "budget"),
    ("response length", "response_length_mean"),
    ("hit ratio", "hit_ratio"),
    ("entropy", "entropy"),
    ("tokens generated", "tokens_generated"),
    ("seconds a step", "step_s"),
    ("memory, GiB", "memory_gib"),
)
COLOURS = dict(zip(PHASES, ("blue", "cyan", "white", "yellow", "magenta"), strict=True))
SHOWN_TOKENS = 160


def watch(folder: str, every: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Redraws until the run has ended or Ctrl-C; `once`, and where the output is no terminal: one picture.

    Raises InputError where there is no run."""
    console = console or Console()
    RunFolder(Path(folder))
    if once or not console.is_terminal:
        console.print(picture(RunFolder(Path(folder))))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                run = RunFolder(Path(folder))
                live.update(picture(run), refresh=True)
                if run.state != "running":
                    break
                time.sleep(every)
    except KeyboardInterrupt:
        return
    console.print(picture(RunFolder(Path(folder))))  # stays after the screen has gone


def picture(run: RunFolder) -> RenderableType:
    """The run as it stands."""
    parts: list[RenderableType] = [_head(run)]
    if not run.steps:
        return Group(*parts, Text("no step is finished yet", style="dim"))
    parts += [_curves(run.steps), _phases(run.steps[-10:])]
    said = _said(run)
    if said:
        parts.append(Panel(Text("\n".join(said)), title="alarms and warnings", border_style="red", title_align="left"))
    responses = _responses(run)
    if responses is not None:
        parts.append(responses)
    return Group(*parts)


def _head(run: RunFolder) -> RenderableType:
    done, wanted = run.last_step, run.wanted_steps
    seconds = [s["step_s"] for s in run.steps[-20:] if isinstance(s.get("step_s"), int | float)]
    facts = [visible(run.name), run.state, f"step {done} of {wanted or '?'}"]
    if seconds and wanted and done < wanted:
        facts.append(f"{duration((wanted - done) * sum(seconds) / len(seconds))} left")
    facts += [f"{visible(name)} {100 * value:.1f}%" for name, value in run.accuracy.items()]
    if run.job:
        facts.append(f"job {visible(run.job)}")
    bar = ProgressBar(total=max(wanted or done or 1, 1), completed=done, width=60)
    return Group(Text("  ".join(facts), style="bold"), bar, Text(""))


def _curves(steps: list[dict[str, Any]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    for title, key in CURVES:
        values = [s[key] if isinstance(s.get(key), int | float) else None for s in steps]
        line = sparkline(values, 60)
        if line:
            table.add_row(
                title, Text(line, style="green"), number(next((v for v in reversed(values) if v is not None), None))
            )
    return table


def _phases(steps: list[dict[str, Any]]) -> RenderableType:
    """Where the seconds of the last steps went, as one bar."""
    sums = {name: sum(s.get(f"{name}_s") or 0.0 for s in steps) for name in PHASES}
    whole = sum(sums.values())
    if not whole:
        return Text("")
    bar, names = Text("\n"), Text()
    for name, colour in COLOURS.items():
        bar.append("█" * round(60 * sums[name] / whole), style=colour)
        names.append(f"{name} {100 * sums[name] / whole:.0f}%  ", style=colour)
    return Group(bar, names, Text(""))


def _said(run: RunFolder) -> list[str]:
    said = []
    for step in run.steps:
        alarms = step.get("alarms")
        texts = [f"ALARM {', '.join(map(str, alarms))}" if isinstance(alarms, list) and alarms else ""]
        texts += [str(step[key]) for key in ("skipped", "warning") if step.get(key)]
        said += [f"step {step['step']}: {visible(text)}" for text in texts if text]
    return said[-4:]


def _responses(run: RunFolder) -> RenderableType | None:
    files = run.recorded
    whole = read_responses(files[max(files)]) if files else None
    responses = [r for r in whole["responses"] if isinstance(r, dict)] if whole else []
    if not responses or whole is None:
        return None
    r = responses[run.last_step % len(responses)]  # another one at each step
    cut = r | {"ids": list(r.get("ids") or ())[:SHOWN_TOKENS]}
    title = (
        f"step {max(files)}: {r.get('length')} tokens, {r.get('effective_length')} effective, by {r.get('end_reason')}"
    )
    prompt = Text(visible(str(r.get("prompt", ""))[-200:]), style="dim")
    return Panel(
        Group(prompt, coloured(cut, whole["tokens"])),
        title=Text(visible(title)),
        title_align="left",
        border_style="dim",
    )
