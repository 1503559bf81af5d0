"""Alarms during training: what makes runs collapse or teach nothing, said while it happens; docs/alarms.md.

An alarm is a level that lasts: it goes on after `patience` steps in a row at which its number is beyond the level, and
off after as many that are within it. No early threshold separates runs that collapse from runs that pass through a bad
patch, so trends are measured against the run's own first steps, and last longer before they are said.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from megatron_opd.config import Config
from megatron_opd.errors import OPDError
from megatron_opd.runtime.launch import ALARM_EXIT_CODE
from megatron_opd.training.watched import Watched

FIRST_STEPS = 10  # a trend is measured against their mean


class AlarmStop(OPDError, RuntimeError):
    """train.alarms: stop has ended the run, which is saved; started again, it stops again while the alarm lasts."""

    exit_code = ALARM_EXIT_CODE


class Alarm(ABC):
    """Base of all.

    name: in the metrics. look_at: what to look at when it is on. patience: steps in a row before it goes on, or off.
    """

    name: ClassVar[str]
    look_at: ClassVar[str]
    patience: ClassVar[int] = 3

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on = False
        self.against = 0  # steps in a row that speak against what `on` says
        self.memory: dict[str, list[float]] = {}  # what a trend is measured against

    def begin(self, gaps: Mapping[str, float]) -> None:  # noqa: B027, most have nothing to do
        """Before the first step of a process: the probe's gaps after its first hand-over, where there is a probe."""

    @abstractmethod
    def sees(self, seen: Watched) -> str | None:
        """What is wrong with the step, with its number; "" where nothing is, None where the step cannot tell."""

    def hear(self, seen: Watched) -> str | None:
        """One step more. Returns what is wrong where the alarm goes on, "" where it goes off, None where it stays."""
        wrong = self.sees(seen)
        if wrong is None:
            return None
        self.against = self.against + 1 if bool(wrong) != self.on else 0
        if self.against < self.patience:
            return None
        self.on, self.against = bool(wrong), 0
        return wrong


class Trend(Alarm):
    """Measured against the mean of the run's first steps, anew where the budget has moved by more than a quarter: what
    the budget does to lengths is no collapse."""

    patience = 10
    follows_budget: ClassVar[bool] = True

    def usual(self, value: float | None, budget: int) -> float | None:
        """The mean over FIRST_STEPS steps that had the number; None until there are so many, and at these."""
        at = self.memory.setdefault("budget", [float(budget)])
        values = self.memory.setdefault("first", [])
        if self.follows_budget and not 0.8 <= budget / at[0] <= 1.25:
            at[0] = float(budget)
            values.clear()
        if len(values) >= FIRST_STEPS:
            return sum(values) / len(values)
        if value is not None and math.isfinite(value):
            values.append(value)
        return None


class TeacherUniform(Alarm):
    name = "teacher_uniform"
    look_at = (
        "teacher.model: parameters that were not loaded or are overwritten; megatron-opd doctor compares it with "
        "transformers"
    )
    level = 0.5

    def sees(self, seen: Watched) -> str | None:
        if seen.from_uniform is None:
            return None
        text = f"the teacher's log-probs are those of a uniform guess to {seen.from_uniform:.2g} nats"
        return text if seen.from_uniform < self.level else ""


class TeacherIsStudent(Alarm):
    name = "teacher_is_student"
    look_at = "teacher.model and student.model: one checkpoint for both teaches nothing"

    def sees(self, seen: Watched) -> str | None:
        if not seen.apart:
            return None
        fp32 = {self.config.student.precision, self.config.teacher.precision} == {"fp32"}
        level = 0.005 if fp32 else 0.15  # another precision or engine moves log-probs by so much
        same = {source: gap for source, gap in seen.apart.items() if gap < level}
        if not same:
            return ""
        where = "" if len(same) == len(seen.apart) else f" on prompts of {', '.join(sorted(same))}"
        return f"the teacher's and the student's log-probs differ by {100 * max(same.values()):.2g}% alone{where}"


class EngineStale(Alarm):
    name = "engine_stale"
    look_at = (
        "the engine's update_parameters: after the hand-over it differs more from the trainer than at the start, so a "
        "parameter keeps an old value"
    )

    def begin(self, gaps: Mapping[str, float]) -> None:
        if "sync_logprob_gap" in gaps:
            self.memory.setdefault("first", [gaps["sync_logprob_gap"]])

    def sees(self, seen: Watched) -> str | None:
        if seen.sync_gap is None:
            return None
        (first,) = self.memory["first"]
        level = max(4 * first, self.config.rollout.tolerance(self.config.student.precision) / 20)
        text = f"after the hand-over engine and trainer differ by {seen.sync_gap:.2g} nats, at first by {first:.2g}"
        return text if seen.sync_gap > level else ""


class ResponseStart(Alarm):
    name = "response_start"
    look_at = (
        "data.template, data.suffix, teacher.system: the teacher must read a prompt behind which a response begins; "
        "scores that belong to a neighbouring token look the same"
    )
    level = -5.0

    def sees(self, seen: Watched) -> str | None:
        if seen.first_advantage is None:
            return None
        text = f"at the responses' first tokens log q - log p is {seen.first_advantage:.1f} nats on average"
        return text if seen.first_advantage < self.level else ""


class StopSuppressed(Alarm):
    name = "stop_suppressed"
    look_at = "loss.stop: event, for models that stop on different tokens; megatron-opd doctor measures both"
    level = -5.0

    def sees(self, seen: Watched) -> str | None:
        if seen.stop_advantage is None:
            return None
        text = f"at the responses' stops log q - log p is {seen.stop_advantage:.1f} nats on average: they are unlearnt"
        return text if seen.stop_advantage < self.level else ""


class Truncation(Trend):
    name = "truncation"
    look_at = "stop_suppressed and repetition beside it, the saved responses in eval/; loss.stop; a lower train.lr"

    def sees(self, seen: Watched) -> str | None:
        first = self.usual(seen.truncated, seen.budget)
        if first is None or seen.truncated is None:
            return None
        text = f"{100 * seen.truncated:.0f}% of the responses reach the budget, {100 * first:.0f}% in the first steps"
        return text if seen.truncated > 0.8 and seen.truncated > first + 0.3 else ""


class Length(Trend):
    name = "length"
    look_at = "the responses in eval/: endless or cut short; entropy and repetition beside it; a lower train.lr"

    def sees(self, seen: Watched) -> str | None:
        first = self.usual(seen.finished_length, seen.budget)
        if first is None or seen.finished_length is None:
            return None
        text = f"responses that end have {seen.finished_length:.0f} tokens, {first:.0f} in the first steps"
        return text if not first / 4 <= seen.finished_length <= 2 * first else ""


class Repetition(Trend):
    name = "repetition"
    look_at = "the responses in eval/: the student runs in circles; truncation and entropy beside it; a lower train.lr"

    def sees(self, seen: Watched) -> str | None:
        first = self.usual(seen.repetition, seen.budget)
        if first is None or seen.repetition is None:
            return None
        text = f"{100 * seen.repetition:.0f}% of 3-grams repeat, {100 * first:.0f}% in the first steps"
        return text if seen.repetition > 0.5 and seen.repetition > first + 0.2 else ""


class EntropyCollapse(Trend):
    name = "entropy"
    look_at = "accuracy and the responses in eval/: the student says one thing alone; a lower train.lr"
    follows_budget = False

    def sees(self, seen: Watched) -> str | None:
        first = self.usual(seen.entropy, seen.budget)
        if first is None or seen.entropy is None:
            return None
        text = f"the student's entropy is {seen.entropy:.2g} nats a token, {first:.2g} in the first steps"
        return text if seen.entropy < 0.02 and seen.entropy < first / 4 else ""


class ImportanceWeights(Alarm):
    name = "importance_weights"
    look_at = (
        "rollout.engine, its precision and version: the sampler is another policy than the trainer; "
        "rollout.importance_clip bounds what that does"
    )

    def sees(self, seen: Watched) -> str | None:
        share, centre = seen.importance_ess, seen.importance_mean
        if share is None or centre is None:
            return None
        text = (
            f"importance weights have the mean {centre:.2g} and the effective sample size {share:.2g} of their number"
        )
        return text if share < 0.3 or not 0.5 <= centre <= 2 else ""


class EngineMismatch(Alarm):
    name = "engine_mismatch"
    look_at = (
        "sync_logprob_gap; rollout.engine's precision (an output layer in bf16, FP8), its prefix cache at a hand-over"
    )
    level = 0.1

    def sees(self, seen: Watched) -> str | None:
        if seen.mismatch is None:
            return None
        text = f"on sampled tokens the engine's KL to the trainer is {seen.mismatch:.2g} nats"
        return text if seen.mismatch > self.level else ""


ALARMS: dict[str, type[Alarm]] = {
    kind.name: kind
    for kind in (
        TeacherUniform,
        TeacherIsStudent,
        EngineStale,
        ResponseStart,
        StopSuppressed,
        Truncation,
        Length,
        Repetition,
        EntropyCollapse,
        ImportanceWeights,
        EngineMismatch,
    )
}


class AlarmWatch:
    """All alarms over a run. Every rank has one and hears the same, so that all come to the same end."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.stops, self.say = config.train.alarms == "stop", say
        self.alarms = [kind(config) for kind in ALARMS.values()]

    @property
    def on(self) -> list[str]:
        """Names of the alarms that are on."""
        return [alarm.name for alarm in self.alarms if alarm.on]

    def begin(self, gaps: Mapping[str, float]) -> None:
        """See `Alarm.begin`."""
        for alarm in self.alarms:
            alarm.begin(gaps)

    def hear(self, step: int, seen: Watched) -> dict[str, Any]:
        """One step more; says what goes on and off. Returns metrics: `alarms`, and the numbers that are watched."""
        for alarm in self.alarms:
            wrong = alarm.hear(seen)
            if wrong:
                self.say(
                    f"ALARM {alarm.name} at step {step}, {alarm.patience} steps in a row: {wrong}; look at "
                    f"{alarm.look_at}"
                )
            elif wrong is not None:
                self.say(f"alarm {alarm.name} is over at step {step}")
        return {"alarms": self.on} | seen.metrics()

    def check(self, step: int) -> None:
        """Raises AlarmStop where an alarm is on that train.alarms: stop ends the run for."""
        if self.stops and self.on:
            raise AlarmStop(
                f"train.alarms: stop: {', '.join(self.on)} on at step {step}, which is saved; the log says what they "
                "saw and docs/alarms.md what to do; train.alarms: warn goes on"
            )

    def state_dict(self) -> dict[str, Any]:
        return {a.name: {"on": a.on, "against": a.against, "memory": a.memory} for a in self.alarms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for alarm in self.alarms:
            if kept := state.get(alarm.name):
                alarm.on, alarm.against, alarm.memory = kept["on"], kept["against"], kept["memory"]
