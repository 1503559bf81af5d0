"""Alarms: each on a run or a step that has its fault, none on a run that is well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import parse_config
from megatron_opd.training.alarms import ALARMS, AlarmWatch
from megatron_opd.training.stop import StopPlan
from megatron_opd.training.watched import Watched, repetition, watch_step
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores
from tests.distributed import run_distributed
from tests.extending.own_engine import TransformersEngine
from tests.tiny_run import REPOSITORY, Case, Outcome, run_cases

EXAMPLE = REPOSITORY / "examples" / "tiny"
CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "device": "cpu",
    "student": {"model": str(EXAMPLE / "models" / "student_drift"), "precision": "fp32"},
    "teacher": {"model": str(EXAMPLE / "models" / "teacher"), "precision": "fp32"},
    "prune": {"preset": "off", "k": 8, "budget": {"initial": 32, "minimum": 32, "maximum": 32}},
    "train": {"steps": 4, "prompts_per_step": 4, "responses_per_prompt": 2, "lr": 3e-4, "tokens_per_microbatch": 4000},
    "data": {"prompts": "prompts.jsonl", "template": "none"},
    "checkpoint": {"every": 0},
}
OWN = "rollout.engine=tests.training.test_alarms:"


class KeepsOneTensor(TransformersEngine):
    """An engine that a hand-over leaves one old tensor in."""

    def update_parameters(self, named_parameters: Any, version: int) -> None:
        def all_but_one() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in named_parameters():
                if name != "model.layers.1.mlp.down_proj.weight":
                    yield name, parameter

        super().update_parameters(all_but_one, version)


class Noisy(TransformersEngine):
    """An engine whose parameters are never quite the trainer's."""

    def update_parameters(self, named_parameters: Any, version: int) -> None:
        super().update_parameters(named_parameters, version)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)


FAULTS = {
    "teacher_uniform": ("teacher.model=FOLDER/uniform",),
    "teacher_is_student": (f"teacher.model={CONFIG['student']['model']}",),
    "response_start": ("teacher.context_key=answer", "teacher.context={prompt}{context}\n{context}"),
    "engine_stale": (OWN + "KeepsOneTensor", "rollout.sync_tolerance=1", "train.lr=1e-3"),
    "importance_weights": (OWN + "Noisy", "rollout.sync_tolerance=100"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Outcome, list[dict[str, Any]], list[str]]]]:
    """By name, for each start of a run: what it said; of all starts together the lines of metrics and checkpoints."""
    folder = tmp_path_factory.mktemp("alarms")
    shutil.copy(EXAMPLE / "prompts" / "train.jsonl", folder / "prompts.jsonl")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    make_uniform(EXAMPLE / "models" / "teacher", folder / "uniform")
    longer = ("train.steps=50", "prune.budget={initial: 64, minimum: 64, maximum: 64}")
    cases = [Case("healthy", longer), *(Case(name, own) for name, own in FAULTS.items())]
    warn = (*FAULTS["teacher_uniform"], "train.steps=6")
    stop = (*warn, "train.alarms=stop")
    cases += [Case("stopped", stop), Case("stopped", stop), Case("stopped", warn)]
    outcomes = run_distributed(1, run_cases, folder, cases)[0]
    found: dict[str, Any] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        lines = (folder / case.name / "metrics.jsonl").read_text().splitlines()
        saved = [p.name for p in (folder / case.name / "checkpoints").iterdir()]
        found.setdefault(case.name, []).append((outcome, [json.loads(line) for line in lines], sorted(saved)))
    return found


def make_uniform(source: Path, folder: Path) -> None:
    """The same model with a last norm of zeros: every token is as likely as any other."""
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.norm.weight.data.zero_()
    model.save_pretrained(folder)


def test_a_healthy_run_sees_none(runs):
    ((outcome, lines, _),) = runs["healthy"]
    assert not outcome.error and len(lines) == 50
    assert [line["alarms"] for line in lines] == [[]] * 50 and "ALARM" not in outcome.said


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_with_a_fault_sees_its_alarm(name, runs):
    ((outcome, lines, _),) = runs[name]
    assert not outcome.error
    assert name in lines[-1]["alarms"], (outcome.said, lines)
    assert lines[1]["alarms"] == []  # a level that lasts, not one step
    assert f"ALARM {name} at step " in outcome.said and ALARMS[name].look_at in outcome.said
    assert name != "importance_weights" or "engine_mismatch" in lines[-1]["alarms"]


def test_stop_ends_the_run_saved_and_warn_goes_on(runs):
    (first, lines, saved), (again, *_), (gone_on, *_) = runs["stopped"]
    assert first.exit_code == again.exit_code == 4 and not gone_on.error
    assert first.error.startswith("AlarmStop: train.alarms: stop: teacher_uniform on at step 3")
    assert "checkpoint of step 3 saved" in first.said and "ALARM teacher_uniform at step 3" in first.said
    assert "resumed at step 3" in again.said and "on at step 4" in again.error  # it lasts, and is not said again
    assert "ALARM teacher_uniform at" not in again.said + gone_on.said
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and saved == ["step_000004", "step_000006"]
    assert [line["alarms"] for line in lines] == [[], [], *[["teacher_uniform"]] * 4]


def watch(stop: bool = False) -> tuple[AlarmWatch, list[str]]:
    config = parse_config(CONFIG | {"train": {"alarms": "stop" if stop else "warn"}})
    said: list[str] = []
    return AlarmWatch(config, said.append), said


def a_step(lengths: list[int], cut: int, confidence: float = 1.0, looped: bool = False, number: int = 0) -> Watched:
    """A step of responses of these lengths, of which the first `cut` were cut by the budget."""
    draw = torch.Generator().manual_seed(number)
    rollouts, scores = [], []
    for i, length in enumerate(lengths):
        tokens = torch.randint(90, (length,), generator=draw)
        tokens = torch.arange(length) % 4 if looped else tokens
        own, other = -torch.rand(2, length, generator=draw) / confidence
        end = "length" if i < cut else "eos"
        rollouts.append(Rollout(Prompt(i, "", [1]), i, tokens, own, tokens[:, None], own[:, None], end, number))
        scores.append(TeacherScores(other[:, None], other, {}, length))
    batch = ScoredBatch(rollouts, scores, [torch.ones(n) for n in lengths], lengths, lengths, [0] * 8, sum(lengths))
    return watch_step(batch, {"budget": 64}, 96, StopPlan(False, frozenset({3}), {"teacher": frozenset({3})}, ""))


USUAL: dict[str, Any] = {"lengths": [64, 64, 20, 24, 28, 20, 24, 28], "cut": 2}
RUN_AWAY = {
    "truncation": {"lengths": [64] * 8, "cut": 8},
    "length": {"lengths": [60] * 8, "cut": 0},
    "short": {"lengths": [4] * 8, "cut": 0},
    "repetition": {"looped": True},
    "entropy": {"confidence": 100},
}


@pytest.mark.parametrize("fault", RUN_AWAY)
def test_a_step_that_runs_away_is_seen_when_it_lasts_and_over_when_it_is_over(fault):
    alarms, said = watch()
    name = "length" if fault == "short" else fault
    usual = [a_step(**USUAL, number=n) for n in range(20)]
    away = [a_step(**(USUAL | RUN_AWAY[fault]), number=n) for n in range(20)]
    on = [alarms.hear(n, seen)["alarms"] for n, seen in enumerate([*usual, *away[:9], usual[0], *away[:9]])]
    assert not any(on), on  # nine steps are a bad patch, and one within the level begins the count anew
    assert alarms.hear(40, away[9])["alarms"] == [name]
    assert len(said) == 1 and said[0].startswith(f"ALARM {name} at step 40, 10 steps in a row: ")
    kept = json.loads(json.dumps(alarms.state_dict()))
    resumed, said = watch(stop=True)
    resumed.load_state_dict(kept)
    on = [resumed.hear(n, seen)["alarms"] for n, seen in enumerate(usual[:9], 41)]
    assert on == [[name]] * 9
    assert resumed.hear(50, usual[9])["alarms"] == [] and said == [f"alarm {name} is over at step 50"]


def test_a_budget_that_moves_is_no_collapse():
    alarms, _ = watch()
    for n in range(60):
        budget = 64 if n < 20 else 32  # at which all are cut
        seen = Watched(budget, truncated=0.2 if n < 20 else 1.0, finished_length=30.0 if n < 20 else 7.0)
        assert alarms.hear(n, seen)["alarms"] == []


def test_a_run_that_learns_what_its_teacher_says_is_no_copy_of_it():
    """Low entropy makes small log-probs, of a student that is right and of a copy; a copy differs by rounding alone."""
    alarms, _ = watch()
    sure = a_step(**USUAL, confidence=1000)
    assert sure.entropy < 1e-3 and 0 < sure.apart[""] and not alarms.hear(1, sure)["alarms"]
    for n in range(3):
        on = alarms.hear(n, Watched(64, apart={"math": 1e-4, "code": 0.3}))["alarms"]
    assert on == ["teacher_is_student"]


def test_a_number_that_a_step_does_not_have_changes_nothing():
    alarms, _ = watch()
    for n in range(3):
        alarms.hear(n, Watched(64, stop_advantage=-25.0))
    assert alarms.on == ["stop_suppressed"]
    for n in range(20):
        assert alarms.hear(n, Watched(64))["alarms"] == ["stop_suppressed"]  # no response stops any more


def test_repetition_is_the_share_of_3_grams_that_came_before():
    prompt, end = Prompt(0, "", [1]), "eos"

    def of(*tokens: int) -> float | None:
        ids, zeros = torch.tensor(tokens), torch.zeros(len(tokens))
        return repetition([Rollout(prompt, 0, ids, zeros, ids[:, None], zeros[:, None], end, 0)])

    assert of(1, 2, 3, 4, 5, 6, 7, 8) == 0
    assert of(1, 2, 3, 1, 2, 3, 1, 2, 3, 1) == pytest.approx(1 - 3 / 8)
    assert of(1, 2, 3) is None


def test_every_alarm_has_its_place_in_the_docs():
    page = (REPOSITORY / "docs" / "alarms.md").read_text()
    assert [name for name in ALARMS if f"| `{name}` |" not in page] == []
    assert all(name == kind.name and kind.patience > 1 for name, kind in ALARMS.items())
