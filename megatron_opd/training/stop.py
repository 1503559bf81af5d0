"""Which tokens end a response for each model, and whether the loss takes a stop as a token or as an event."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class StopPlan:
    """The terminators of both models, and what `loss.stop` comes to."""

    event: bool
    student: frozenset[int]  # on which the engine stops
    teacher: frozenset[int]
    note: str  # the choice, in words


def resolve_stop(config: Config, tokenizer: Tokenizer) -> StopPlan:
    """`loss.stop: auto` takes stops as events where the models stop on different tokens and the teacher's scores come
    before training and are the teacher's own."""
    student, teacher = tokenizer.eos_ids, load_tokenizer(config.teacher.model).terminators
    wanted, fused, changed = config.loss.stop, config.score.mode == "fused", config.loss.changes_scores
    event = wanted == "event" or (wanted == "auto" and student != teacher and not fused and not changed)
    sets = f"student stops on {sorted(student)}, teacher on {sorted(teacher)}"
    note = f"loss.stop: {'event' if event else 'token'} ({sets})" if student != teacher or wanted != "auto" else ""
    if student != teacher and not event:
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
    return StopPlan(event, student, teacher, note.removeprefix("; "))
