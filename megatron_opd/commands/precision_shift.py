"""`megatron-opd doctor --fp8 CONFIG`: what FP8 does to the numbers that pruning decides by.

FP8 changes logits, and the overlap of two models' most likely tokens decides drift. Here the same responses are read by
student and teacher in bf16 and in FP8, and what follows from their candidates is compared: overlap, drift events at
several thresholds, effective length. The comparison itself knows nothing of FP8: it takes any two readings.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_opd.commands.doctor import sample_responses
from megatron_opd.config import Config, ConfigError, ModelConfig
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.models.build import build_model, check_layout
from megatron_opd.models.model import Model
from megatron_opd.models.specs import use_transformer_engine
from megatron_opd.parallel.groups import Layout, student_layout, teacher_layout
from megatron_opd.prune import drift_events, from_events
from megatron_opd.prune.overlap import shared_ids
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.scoring.separate import top_candidates
from megatron_opd.training.run import load_tokenizers
from megatron_opd.training.setup import init_distributed
from megatron_opd.types import Rollout

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
LIMIT = 0.01  # a threshold is supported where no combination moves the event rate by more than this
PROMPTS, TOKENS = 32, 1024

Reading = Sequence[Tensor]  # of each response, a model's candidates [T, K]
Changes = Mapping[str, Any]  # keys of a ModelConfig


@dataclass(frozen=True)
class Combination:
    """One combination of a student's and a teacher's reading, against the first combination."""

    student: str
    teacher: str
    overlap: float  # mean over tokens
    changed: float  # share of tokens whose overlap is not that of the first combination
    event_rate: dict[float, float]  # by threshold: share of tokens that are events
    flipped: dict[float, float]  # by threshold: share of tokens that are an event in one of the two alone
    effective_length: dict[float, float]  # by threshold: mean over responses, in tokens


@dataclass(frozen=True)
class Shift:
    """What reading the same responses differently does."""

    tokens: int
    combinations: list[Combination]  # plain with plain first
    self_overlap: dict[str, float]  # of each model's two readings with each other
    limit: float

    def supported(self) -> list[float]:
        """Thresholds whose event rate no combination moves by more than `limit`."""
        first, *others = self.combinations
        moved = {t: max(abs(r.event_rate[t] - rate) for r in others) for t, rate in first.event_rate.items()}
        return [t for t, move in moved.items() if move <= self.limit]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"supported": self.supported()}


def compare(
    student: Mapping[str, Reading],
    teacher: Mapping[str, Reading],
    w_drop: float,
    thresholds: Sequence[float] = THRESHOLDS,
    limit: float = LIMIT,
) -> Shift:
    """Compares two readings, by name and the plain one first, of both models: all four combinations.

    Args:
        w_drop: reliability lost per event, for the effective length (docs/method.md items 2 to 5).
    """
    plain, other = student
    if list(teacher) != [plain, other]:
        raise ValueError(f"the student was read as {list(student)}, the teacher as {list(teacher)}")
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.bool) for ids in student[plain]], batch_first=True)
    combinations: list[Combination] = []
    base = torch.empty(0)
    for own, theirs in ((plain, plain), (other, plain), (plain, other), (other, other)):
        overlap = pad_sequence([shared(a, b) for a, b in zip(student[own], teacher[theirs])], batch_first=True)
        base = overlap if not combinations else base
        events = {t: drift_events(overlap, mask, t) for t in thresholds}
        before = {t: drift_events(base, mask, t) for t in thresholds}
        combinations.append(
            Combination(
                own,
                theirs,
                _mean(overlap, mask),
                _mean(overlap != base, mask),
                {t: _mean(e, mask) for t, e in events.items()},
                {t: _mean(e != before[t], mask) for t, e in events.items()},
                {t: _effective(e, mask, w_drop) for t, e in events.items()},
            )
        )
    own_overlap = {}
    for name, readings in (("student", student), ("teacher", teacher)):
        overlap = pad_sequence([shared(a, b) for a, b in zip(readings[plain], readings[other])], batch_first=True)
        own_overlap[name] = _mean(overlap, mask)
    return Shift(int(mask.sum()), combinations, own_overlap, limit)


def shared(a: Tensor, b: Tensor) -> Tensor:
    """Share of the candidates a [T, K] that are among b [T, K]: [T] float32."""
    return shared_ids(a, b).float().mean(-1)


def _mean(values: Tensor, mask: Tensor) -> float:
    return float(values[mask].double().mean())


def _effective(events: Tensor, mask: Tensor, w_drop: float) -> float:
    return float(from_events(events, mask, w_drop, 0.0).effective_length.double().mean())


def fp8_changes(model: ModelConfig) -> tuple[Changes, Changes]:
    """How to build a model in bf16, and how in the FP8 that its config names (hybrid where it names none)."""
    plain = {"precision": "bf16", "fp8": None, "fp8_params": False, "fp8_bf16_ends": 0}
    recipe = model.fp8_recipe if model.fp8 else "tensorwise"
    return plain, {"precision": "bf16", "fp8": model.fp8 or "hybrid", "fp8_recipe": recipe}


def changed(name: str, model: ModelConfig, changes: Changes) -> ModelConfig:
    """Raises ConfigError where the changed config contradicts itself."""
    try:
        return type(model).model_validate({**model.model_dump(exclude={"offload"}), **changes})
    except ValidationError as error:
        raise ConfigError(f"{name}: {error.errors()[0]['msg']}") from None


def measure(
    config: Config,
    tokenizer: Tokenizer,
    device: torch.device,
    names: tuple[str, str],
    ways: Mapping[str, tuple[Changes, Changes]],
) -> Shift:
    """Builds each model in both ways, one at a time, and compares how they read the responses of the first student.

    Collective over all ranks; the same result on each.

    Args:
        names: of the two ways.
        ways: for student and teacher, the changes to their configs in both.
    """
    if config.teachers:
        raise ConfigError("precision-shift compares one teacher; name it in teacher:, and add 'teachers=[]'")
    layouts = {"student": student_layout(config.student.parallel), "teacher": teacher_layout(config.teacher.parallel)}
    settings: dict[str, ModelConfig] = {"student": config.student, "teacher": config.teacher}
    rollouts: list[Rollout] = []
    readings: dict[str, dict[str, Reading]] = {"student": {}, "teacher": {}}
    for role, (first, second) in ways.items():
        for name, changes in zip(names, (first, second)):
            model = _build(role, changed(role, settings[role], changes), layouts[role], device)
            if not rollouts:
                engine = MegatronEngine(
                    model, set(tokenizer.eos_ids), config.rollout.max_batch, config.rollout.cache_gib
                )
                rollouts = sample_responses(config, engine, tokenizer, PROMPTS, TOKENS)
                del engine
            readings[role][name] = top_candidates(model, rollouts, config.prune.k, config.train.tokens_per_microbatch)
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    thresholds = sorted({*THRESHOLDS, config.prune.threshold})
    return compare(readings["student"], readings["teacher"], config.prune.w_drop, thresholds)


def _build(name: str, settings: ModelConfig, layout: Layout, device: torch.device) -> Model:
    model = build_model(name, settings, layout, device)
    for chunk in model.chunks:
        chunk.requires_grad_(False)
    return model


def diagnose_fp8(config: Config) -> int:
    """The command: prints the table and what it means; collective. Raises ConfigError where FP8 cannot run here."""
    device = init_distributed(config)
    ways: dict[str, tuple[Changes, Changes]] = {}
    for name, settings in (("student", config.student), ("teacher", config.teacher)):
        ways[name] = fp8_changes(settings)
        wanted = changed(name, settings, ways[name][1])
        use_transformer_engine(name, wanted, device.type == "cpu")  # before anything is generated
        check_layout(name, wanted)
    tokenizer, _ = load_tokenizers(config)
    shift = measure(config, tokenizer, device, ("bf16", "FP8"), ways)
    if int(os.environ.get("RANK", "0")) == 0:
        report(shift, config.prune.threshold, Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140))
    return 0


def report(shift: Shift, threshold: float, console: Console) -> None:
    """The table, and in words which thresholds stand."""
    thresholds = list(shift.combinations[0].event_rate)
    table = Table(title=f"the same {shift.tokens:,} tokens; per cent of tokens", title_justify="left")
    for name in ("student", "teacher"):
        table.add_column(name)
    for name in ("overlap", "changed", *(f"events < {t:g}" for t in thresholds), "flipped", "length"):
        table.add_column(name, justify="right")
    for one in shift.combinations:
        table.add_row(
            one.student,
            one.teacher,
            f"{100 * one.overlap:.2f}",
            f"{100 * one.changed:.1f}",
            *(f"{100 * one.event_rate[t]:.2f}" for t in thresholds),
            f"{100 * one.flipped[threshold]:.2f}",
            f"{one.effective_length[threshold]:.0f}",
        )
    console.print(table)
    student, teacher = shift.self_overlap["student"], shift.self_overlap["teacher"]
    plain, other = shift.combinations[0].student, shift.combinations[-1].student
    supported = ", ".join(f"{t:g}" for t in shift.supported()) or "none of these"
    console.print(
        f"Of its candidates in {plain} the student keeps {100 * student:.2f}% in {other}, the teacher "
        f"{100 * teacher:.2f}%. changed: the overlap is another one. flipped (an event in one of the two alone) and "
        f"length (effective, mean, in tokens): at threshold {threshold:g}.\n"
        f"Thresholds whose event rate moves by no more than {100 * shift.limit:g} points: {supported}",
        markup=False,
        highlight=False,
    )
