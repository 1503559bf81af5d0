"""The learning rate of each step: what is logged is what moves the parameters, and no step is spent on rate 0."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_opd.config import TrainConfig
from megatron_opd.training.setup import build_scheduler
from tests.distributed import run_distributed
from tests.tiny_run import Case, TinyRun, run_cases


class Groups:
    """What the scheduler reads and writes of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": math.nan, "weight_decay": 0.0}]


def used(train: TrainConfig) -> list[float]:
    """The rate of every step."""
    optimizer = Groups()
    scheduler = build_scheduler(optimizer, train)
    rates = []
    for _ in range(train.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_step_against_the_formula(schedule, warmup):
    train = TrainConfig(steps=10, lr=2e-4, min_lr=2e-5, lr_schedule=schedule, warmup_steps=warmup)
    begin = max(warmup - 1, 0)  # number, from 0, of the first step at the peak
    for step, rate in enumerate(used(train)):
        done = max(0.0, (step - begin) / (10 - begin))
        share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
        expected = 2e-4 * (step + 1) / warmup if step < begin else 2e-5 + (2e-4 - 2e-5) * share
        assert rate == pytest.approx(expected if schedule != "constant" or step < begin else 2e-4, rel=1e-9)
        assert rate > 0


def test_the_logged_rate_is_what_moves_the_parameters(tmp_path):
    """Adam's first step moves a parameter by the learning rate, whatever its gradient."""
    run = TinyRun(tmp_path, train={"steps": 1, "warmup_steps": 0, "lr": 3e-3}, checkpoint={"every": 1})
    whole = ("student.parallel={}", "teacher.parallel={}")
    warm = (*whole, "train.warmup_steps=4", "train.steps=5")
    outcomes = run_distributed(1, run_cases, run.folder, [Case("flat", whole), Case("warm", warm)])[0]
    assert not any(outcome.error for outcome in outcomes), outcomes
    assert [line["lr"] for line in run.metrics(run.folder / "flat")] == [3e-3]
    rates = [line["lr"] for line in run.metrics(run.folder / "warm")]
    assert rates == pytest.approx([3e-3 * k / 4 for k in (1, 2, 3, 4)] + [3e-3])
    assert run.metrics(run.folder / "flat")[0]["grad_norm"] > 0 and torch.isfinite(torch.tensor(rates)).all()
