"""Which tokens end a response for each model, and whether the loss takes a stop as a token or as an event."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import DEFAULT_TEACHER, Config
from megatron_opd.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class StopPlan:
    """The terminators of both models, and what `loss.stop` comes to."""

    event: bool
    student: frozenset[int]  # on which the engine stops
    teachers: dict[str, frozenset[int]]  # by name
    note: str  # the choice, in words

    @property
    def teacher(self) -> frozenset[int]:
        """Those of the teacher that judges where no other does."""
        return self.teachers[DEFAULT_TEACHER]


def resolve_stop(config: Config, tokenizer: Tokenizer) -> StopPlan:
    """`loss.stop: auto` takes stops as events where the models stop on different tokens and the teacher's scores come
    before training and are the teacher's own."""
    student = tokenizer.eos_ids
    teachers = {name: load_tokenizer(t.model).terminators for name, t in config.teacher_by_name.items()}
    differ = any(student != teacher for teacher in teachers.values())
    wanted, fused, changed = config.loss.stop, config.score.mode == "fused", config.loss.changes_scores
    event = wanted == "event" or (wanted == "auto" and differ and not fused and not changed)
    others = ", ".join(f"{name} on {sorted(teacher)}" for name, teacher in teachers.items())
    sets = f"student stops on {sorted(student)}, {others}"
    note = f"loss.stop: {'event' if event else 'token'} ({sets})" if differ or wanted != "auto" else ""
    if differ and not event:
        note += "; a stop of the student may be punished for its token: " + (
            "score.mode: separate can take it as an event"
            if fused
            else "loss.proximal bounds that, and excludes loss.stop: event"
            if config.loss.proximal
            else "set loss.stop: event"
        )
    if tokenizer.terminators - student:
        note += f"; the student's chat template ends turns with {sorted(tokenizer.terminators - student)}, on which "
        note += "nothing stops"
    return StopPlan(event, student, teachers, note.removeprefix("; "))
