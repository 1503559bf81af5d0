"""`megatron-opd show RUN`: recorded responses in the terminal, each token coloured by what the models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_opd.commands.terminal import coloured, visible
from megatron_opd.errors import InputError
from megatron_opd.records.reading import read_responses
from megatron_opd.records.run_folder import RunFolder


def show(
    folder: str, step: int | None = None, number: int | None = None, by: str = "overlap", console: Console | None = None
) -> None:
    """Prints responses of a step, by default those of the newest; `number`: one of them, from 0.

    Raises InputError where nothing is recorded, or not that."""
    console = console or Console(soft_wrap=True)
    run = RunFolder(Path(folder))
    files = run.recorded
    if not files:
        raise InputError(f"{folder}: no responses were recorded (train.record_responses)")
    wanted = max(files) if step is None else step
    if wanted not in files:
        near = min(files, key=lambda known: abs(known - wanted))
        raise InputError(f"{folder}: step {wanted} is not recorded; {len(files)} steps are, the nearest is {near}")
    step = wanted
    whole = read_responses(files[step])
    if whole is None:
        raise InputError(f"{files[step]}: is torn")
    responses = [r for r in whole["responses"] if isinstance(r, dict)]
    if number is not None and not 0 <= number < len(responses):
        raise InputError(f"{folder}: step {step} has the responses 0 to {len(responses) - 1}, not {number}")
    for i, response in enumerate(responses):
        if number is None or i == number:
            _print(console, step, i, response, whole["tokens"], by)


def _print(console: Console, step: int, number: int, r: dict[str, Any], texts: dict[str, Any], by: str) -> None:
    facts = [f"step {step}", f"response {number}", f"{r.get('length')} tokens", f"ended by {r.get('end_reason')}"]
    facts += [f"{r.get('effective_length')} effective", f"{r.get('events')} drift events"]
    facts += [f"{name} {r[name]}" for name in ("source", "teacher", "reward") if r.get(name) not in (None, "")]
    console.print(visible("── " + " · ".join(facts)), style="bold", markup=False, highlight=False)
    console.print(visible(r.get("prompt", "")), style="dim", markup=False, highlight=False)
    if r.get("answer") is not None:
        console.print(f"reference answer: {visible(r['answer'])}", style="dim", markup=False, highlight=False)
    console.print(coloured(r, texts, by), highlight=False)
