"""Checks a finished run against its recipe's bounds: `megatron-opd gate RUN_DIR GATE.yaml`.

What is missing fails: a run that ended early, a metric that it never wrote, an evaluation that never took place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_opd.config.loading import read_text
from megatron_opd.config.reading import Reader
from megatron_opd.errors import ConfigError, InputError
from megatron_opd.records.lines import METRICS, read_steps


class GateError(InputError):
    """The gate or the run cannot be read; the message names the file and the key."""


class Bounds(BaseModel):
    """Where one number must lie."""

    model_config = ConfigDict(extra="forbid")
    minimum: float | None = None
    maximum: float | None = None
    last: int = Field(default=1, gt=0)
    """The mean over this many steps at the end of the run, or over the steps of the last evaluations."""

    @model_validator(mode="after")
    def _check(self) -> Bounds:
        if self.minimum is None and self.maximum is None:
            raise ValueError("give a minimum, a maximum or both")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum: {self.minimum} is above maximum: {self.maximum}")
        return self

    def hold(self, value: float) -> bool:
        least = -math.inf if self.minimum is None else self.minimum
        most = math.inf if self.maximum is None else self.maximum
        return least <= value <= most  # NaN lies nowhere

    def __str__(self) -> str:
        parts = [f"at least {self.minimum:g}"] if self.minimum is not None else []
        parts += [f"at most {self.maximum:g}"] if self.maximum is not None else []
        return " and ".join(parts)


class Gate(BaseModel):
    """The bounds of one recipe."""

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(gt=0)
    """The step that the run must have reached."""
    metrics: dict[str, Bounds] = Field(default_factory=dict)
    """Keys of metrics.jsonl."""
    accuracy: dict[str, Bounds] = Field(default_factory=dict)
    """Evaluation sets, by name."""
    phases: dict[str, Bounds] = Field(default_factory=dict)
    """Share of the steps' time, over the whole run: rollout, score, cut, train, sync."""


@dataclass(frozen=True)
class Finding:
    """One bound and what the run has there; `value` is None where it has nothing."""

    name: str
    value: float | None
    bounds: str
    holds: bool


def load_gate(path: str | Path) -> Gate:
    """Reads a gate. Raises GateError."""
    reader = Reader()
    try:
        values = reader.file(read_text(path, "gate"), str(path), Gate)
    except ConfigError as error:
        raise GateError(str(error)) from error
    problems = reader.problems
    if values is not None:
        try:
            gate = Gate.model_validate(values)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'gate'}: {e['msg']}" for e in error.errors()]
            problems = [*problems, f"{path}: " + "; ".join(wrong)]
    if problems:
        raise GateError("\n".join(problems))
    return gate


def check(gate: Gate, steps: list[dict[str, Any]]) -> list[Finding]:
    """Every bound against the lines of a run's metrics.jsonl."""
    reached = steps[-1]["step"] if steps else 0
    findings = [Finding("steps", reached, f"at least {gate.steps}", reached >= gate.steps)]
    for name, bounds in gate.metrics.items():
        findings.append(_finding(name, bounds, [_number(s.get(name)) for s in steps[-bounds.last :]]))
    for name, bounds in gate.accuracy.items():
        evaluated = [s["accuracy"].get(name) for s in steps if s.get("accuracy")]
        findings.append(_finding(f"accuracy of {name}", bounds, [_number(a) for a in evaluated[-bounds.last :]]))
    total = sum(s["step_s"] for s in steps)
    for name, bounds in gate.phases.items():
        spent = [_number(s.get(f"{name}_s")) for s in steps]
        share = [sum(s for s in spent if s is not None) / total] if total and None not in spent else []
        findings.append(_finding(f"time share of {name}", bounds, list(share)))
    return findings


def _finding(name: str, bounds: Bounds, values: list[float | None]) -> Finding:
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return Finding(name, None, str(bounds), False)
    value = sum(known) / len(known)
    label = f"{name}, mean of the last {bounds.last}" if bounds.last > 1 else name
    return Finding(label, value, str(bounds), bounds.hold(value))


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer of some hundred digits
        return math.inf if value > 0 else -math.inf


def gate_run(run_dir: str | Path, gate: str | Path) -> bool:
    """Prints every bound with the run's number; returns whether all hold. Raises GateError."""
    wanted = load_gate(gate)
    path = Path(run_dir, METRICS)
    try:
        steps = read_steps(path)
    except OSError as error:
        raise GateError(f"{path} cannot be read: {error.strerror}; give a run_dir") from error
    try:
        findings = check(wanted, steps)
    except (AttributeError, TypeError, KeyError) as error:
        raise GateError(
            f"{path} holds a step whose step_s is no number or whose accuracy is no object: {error!r}"
        ) from error
    width = max(len(f.name) for f in findings)
    for one in findings:
        value = "missing" if one.value is None else f"{one.value:.4g}"
        print(f"{'holds ' if one.holds else 'BROKEN'}  {one.name:<{width}}  {value:>10}  {one.bounds}")
    broken = [f.name for f in findings if not f.holds]
    print(f"{run_dir}: " + (f"{len(broken)} of {len(findings)} bounds are broken" if broken else "all bounds hold"))
    return not broken
