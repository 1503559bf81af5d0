"""What metrics.jsonl says of a step against counts that are taken elsewhere: in the sampler, at the teacher's input, of
the batch itself, of the gradient and of the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny_run import Case, Outcome, TinyRun, run_cases

WHOLE = ("student.parallel={}", "teacher.parallel={}")
CASES = {
    "separate": (),
    "cut": ("prune.cut=reliability", "prune.w_base=0", "prune.w_drop=0.2", "prune.segment=4"),
    "in_flight": ("prune.preset=in_flight", "prune.w_drop=0.2", "prune.segment=8"),
    "fused": ("score.mode=fused",),
    "hot": ("rollout.temperature=4", "prune.budget={initial: 40, minimum: 8, maximum: 40, margin: 10, patience: 1}"),
}
SHORT = {"train": {"steps": 3, "warmup_steps": 0}, "checkpoint": {"every": 0}}


def counted(rank: int, world: int, folder: Path, cases: list[Case]) -> tuple[list[Outcome], dict[str, list[dict]]]:
    """Runs the cases and counts beside them: {case: one dict a step}."""
    from megatron_opd.models.cached import CachedForward
    from megatron_opd.rollout.megatron import engine
    from megatron_opd.scoring import fused, separate
    from megatron_opd.training import loop
    from megatron_opd.training.step import TrainingStep

    now: dict[str, Any] = {}
    counts: dict[str, list[dict]] = {}
    plain_sample, plain_inputs, plain_prefill = engine.sample, separate._inputs, CachedForward.prefill
    plain_step, plain_train, plain_score = loop.step, TrainingStep.__call__, fused.FusedTeacher.score

    def sample(logits: torch.Tensor, *rest: Any) -> Any:
        now["sampled"] += len(logits)
        return plain_sample(logits, *rest)

    def inputs(rollouts: list, packed: Any, tokens: int) -> torch.Tensor:
        now["scored"] += sum(len(r) for r in rollouts)  # a prediction for each
        return plain_inputs(rollouts, packed, tokens)

    def prefill(self: Any, tokens: torch.Tensor, lengths: Any, starts: Any, slots: Any, wanted: Any) -> Any:
        if self.model.name == "teacher":
            now["scored"] += len(wanted)
        return plain_prefill(self, tokens, lengths, starts, slots, wanted)

    def score(self: Any, logits: Any, teacher: Any, sampled: Any, spans: Any, predicts: torch.Tensor) -> Any:
        now["scored"] += int(predicts.sum())
        return plain_score(self, logits, teacher, sampled, spans, predicts)

    def train(self: Any, batch: Any) -> Any:
        began = time.perf_counter()
        before = [p.detach().clone() for chunk in self.trainer.ddp for p in chunk.parameters()]
        optimizer = self.trainer.optimizer
        plain = optimizer.step

        def step(*args: Any) -> Any:
            squares = sum(float((p.main_grad.double() ** 2).sum()) for c in self.trainer.ddp for p in c.parameters())
            now["grad_norm"] = math.sqrt(squares)
            return plain(*args)

        optimizer.step = step
        result = plain_train(self, batch)
        optimizer.step = plain
        after = [p.detach() for chunk in self.trainer.ddp for p in chunk.parameters()]
        now["moved"] = max(float((a - b).abs().max()) for a, b in zip(after, before))
        now["train_s"] = time.perf_counter() - began
        now["batch"] = {
            "lengths": [len(r) for r in batch.rollouts],
            "ends": [r.end_reason for r in batch.rollouts],
            "prompts": [len(r.prompt.tokens) for r in batch.rollouts],
            "effective": [int((w > 1e-6).sum()) if self.config.prune.w_base == 0 else None for w in batch.prune_weight],
            "kept": [int((w[:n] > 0).sum()) for w, n in zip(batch.prune_weight, batch.kept_length)],
        }
        return result

    def one_step(run: Any) -> dict[str, Any]:
        now.clear()
        now.update(sampled=0, scored=0)
        began = time.perf_counter()
        metrics = plain_step(run)
        counts.setdefault(Path(run.config.run_dir).name, []).append(
            {**now, "step_s": time.perf_counter() - began, "budget_next": run.budget.current}
        )
        return metrics

    engine.sample, separate._inputs, CachedForward.prefill = sample, inputs, prefill
    loop.step, TrainingStep.__call__, fused.FusedTeacher.score = one_step, train, score
    try:
        return run_cases(rank, world, folder, cases), counts
    finally:
        engine.sample, separate._inputs, CachedForward.prefill = plain_sample, plain_inputs, plain_prefill
        loop.step, TrainingStep.__call__, fused.FusedTeacher.score = plain_step, plain_train, plain_score


Steps = Callable[[str], list[tuple[dict, dict]]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Of a case, each step's metrics and what was counted."""
    run = TinyRun(tmp_path_factory.mktemp("counts"), **SHORT)
    cases = [Case(name, (*WHOLE, *changes)) for name, changes in CASES.items()]
    outcomes, counts = run_distributed(1, counted, run.folder, cases)[0]
    assert not any(outcome.error for outcome in outcomes), outcomes

    def of(name: str) -> list[tuple[dict, dict]]:
        import json

        lines = [json.loads(line) for line in (run.folder / name / "metrics.jsonl").read_text().splitlines()]
        return list(zip(lines, counts[name], strict=True))

    return of


@pytest.mark.parametrize("name", CASES)
def test_tokens(name, steps):
    for line, seen in steps(name):
        batch = seen["batch"]
        assert line["tokens_generated"] == seen["sampled"]
        assert line["tokens_kept"] == sum(batch["lengths"])
        assert line["tokens_scored"] == seen["scored"]
        assert line["tokens_scored_prompt"] == sum(batch["prompts"])
        assert line["tokens_trained"] == sum(batch["kept"])
        assert line["response_length_mean"] == pytest.approx(sum(batch["lengths"]) / len(batch["lengths"]))
        assert line["ended"] == {end: batch["ends"].count(end) for end in ("eos", "length", "drift")}


def test_in_flight_samples_more_than_it_keeps_and_says_so(steps):
    generated, kept = (sum(line[key] for line, _ in steps("in_flight")) for key in ("tokens_generated", "tokens_kept"))
    assert generated > kept
    assert all(line["tokens_generated"] == line["tokens_kept"] for line, _ in steps("separate"))


def test_responses_end_in_several_ways(steps):
    ends = [line["ended"] for name in CASES for line, _ in steps(name)]
    assert all(sum(end[reason] for end in ends) > 0 for reason in ("length", "drift"))


def test_effective_lengths_hits_and_the_budget(steps):
    for name in ("cut", "in_flight"):
        for line, seen in steps(name):
            effective = seen["batch"]["effective"]
            assert line["effective_length_mean"] == pytest.approx(sum(effective) / len(effective))
            assert line["effective_length_max"] == max(effective)
            boundary = max(8, line["budget"] - 4)  # minimum and margin of the config
            assert line["hit_ratio"] == sum(n >= boundary for n in effective) / len(effective)
            assert line["budget_next"] == seen["budget_next"]
        lines = [line for line, _ in steps(name)]
        assert [line["budget"] for line in lines[1:]] == [line["budget_next"] for line in lines[:-1]]


@pytest.mark.parametrize("name", CASES)
def test_gradient_norm_and_learning_rate(name, steps):
    for number, (line, seen) in enumerate(steps(name)):
        assert line["grad_norm"] == pytest.approx(seen["grad_norm"], rel=1e-4)
        if number == 0:  # Adam's first step moves a parameter by the rate, whatever its gradient
            assert line["lr"] == pytest.approx(seen["moved"], rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_phases_add_up_to_the_step(name, steps):
    for line, seen in steps(name):
        phases = [line[f"{phase}_s"] for phase in ("rollout", "score", "cut", "train", "sync") if f"{phase}_s" in line]
        assert sum(phases) <= line["step_s"] <= seen["step_s"]
        assert line["train_s"] >= seen["train_s"]  # what is measured here lies inside
