"""The response budget against 203 steps of a real run, and across a resume."""

import csv
from pathlib import Path

import pytest
import torch

from megatron_opd.config import parse_config
from megatron_opd.prune import ResponseBudget, StaircaseBudget
from megatron_opd.training.run import make_budget

REPLAY = Path(__file__).parents[1] / "data" / "budget_replay.csv"


def _rows():
    with REPLAY.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 203
    return rows


def _paper():
    return ResponseBudget(initial=2048, minimum=1024, maximum=12288)


def test_replays_a_real_run_row_by_row():
    budget = _paper()
    for row in _rows():
        assert budget.current == int(row["budget"]), f"step {row['step']}"
        assert budget.update_from_hit_ratio(float(row["hit_ratio"])) == int(row["next_budget"]), f"step {row['step']}"
        assert budget.no_hit_steps == int(row["no_hit_steps"]), f"step {row['step']}"
        assert budget.last_hit_ratio == float(row["hit_ratio"])


@pytest.mark.parametrize("stop", [1, 2, 77])
def test_a_resumed_run_goes_on_as_if_never_stopped(stop):
    rows, budget = _rows(), _paper()
    for row in rows[:stop]:
        budget.update_from_hit_ratio(float(row["hit_ratio"]))
    resumed = _paper()
    assert resumed.load_state_dict(budget.state_dict()) == []
    for row in rows[stop:]:
        assert resumed.update_from_hit_ratio(float(row["hit_ratio"])) == int(row["next_budget"])


def test_hits_are_counted_at_the_boundary():
    budget = ResponseBudget(initial=2048, minimum=1024, maximum=2100)
    assert budget.boundary == 1948
    assert budget.measure(torch.tensor([1947, 1948, 2048, 0])) == 0.5
    assert budget.update([1948] + [0] * 9) == 2100, "a hit ratio of exactly 0.1 grows the budget, up to the maximum"
    assert budget.update([0] * 10) == 2100
    assert ResponseBudget(initial=1030, minimum=1024, maximum=2048).boundary == 1024, "never below the minimum"


def test_shrinks_to_the_minimum_only_every_third_miss():
    budget = ResponseBudget(initial=1100, minimum=1024, maximum=2048)
    assert [budget.update([0]) for _ in range(7)] == [1100, 1100, 1024, 1024, 1024, 1024, 1024]


def test_errors_name_the_argument():
    for arguments, message in [
        (dict(initial=100, minimum=200, maximum=300), "minimum 200, initial 100"),
        (dict(initial=400, minimum=200, maximum=300), "initial 400, maximum 300"),
        (dict(initial=1, minimum=0, maximum=3), "minimum 0"),
        (dict(initial=1, minimum=1, maximum=3, step=0), "step must be at least 1, got 0"),
        (dict(initial=1, minimum=1, maximum=3, margin=-1), "margin must be at least 0"),
        (dict(initial=1, minimum=1, maximum=3, patience=0), "patience must be at least 1"),
        (dict(initial=1, minimum=1, maximum=3, hit_ratio=0.0), "hit_ratio must lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            ResponseBudget(**arguments)
    budget = _paper()
    with pytest.raises(ValueError, match="effective_lengths is empty"):
        budget.update([])
    for h in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in 0..1"):
            budget.update_from_hit_ratio(h)
    assert budget.state_dict() == _paper().state_dict(), "a refused update changes nothing"


def test_a_resumed_budget_keeps_its_own_settings_and_a_broken_state_is_refused():
    budget = ResponseBudget(initial=4000, minimum=1024, maximum=4096, step=50, patience=9)
    for h in (1.0, 0, 0, 0, 0):
        budget.update_from_hit_ratio(h)
    other = ResponseBudget(initial=2048, minimum=1024, maximum=3000)
    assert other.load_state_dict(budget.state_dict()) == [
        "initial 4000 -> 2048",
        "maximum 4096 -> 3000",
        "step 50 -> 100",
        "patience 9 -> 3",
    ]
    assert (budget.current, budget.no_hit_steps) == (4050, 4)
    assert (other.current, other.no_hit_steps, other.last_hit_ratio) == (3000, 2, 0.0)
    assert other.update_from_hit_ratio(0) == 2900, "the third step without a hit"
    with pytest.raises(ValueError, match="missing .'current'., unknown .'now'."):
        other.load_state_dict({"now" if k == "current" else k: v for k, v in budget.state_dict().items()})
    with pytest.raises(ValueError, match="current 99 outside 1024..4096"):
        other.load_state_dict({**budget.state_dict(), "current": 99})
    with pytest.raises(ValueError, match="no_hit_steps 9 outside 0..8"):
        other.load_state_dict({**budget.state_dict(), "no_hit_steps": 9})


def test_a_staircase_on_the_worked_numbers():
    """POPD: H_0 = dH = 1024, dk = 10, T = 4096."""
    budget = StaircaseBudget(initial=1024, minimum=1024, maximum=4096, step=1024, patience=10)
    used = []
    for step in range(45):
        used.append(budget.current)
        budget.update_from_hit_ratio(step % 2)  # whatever the responses are
    assert used == [1024] * 10 + [2048] * 10 + [3072] * 10 + [4096] * 15


def test_a_staircase_goes_on_from_its_stair():
    budget = StaircaseBudget(initial=8, minimum=8, maximum=64, step=8, patience=3)
    for _ in range(5):
        budget.update([1, 2])
    resumed = StaircaseBudget(initial=8, minimum=8, maximum=64, step=8, patience=3)
    resumed.load_state_dict(budget.state_dict())
    assert [resumed.update([1]) for _ in range(4)] == [budget.update([1]) for _ in range(4)] == [24, 24, 24, 32]


@pytest.mark.parametrize(
    ("prune", "budgets"),
    [
        ({"preset": "off"}, [400, 400]),
        ({"preset": "topd"}, [100, 100]),  # a quarter of the maximum, for ever
        ({"preset": "topd", "budget": {"share": 0.1}}, [40, 40]),
        ({"preset": "prefix", "budget": {"patience": 1}}, [256, 400]),
        ({"preset": "popd", "budget": {"initial": 100, "minimum": 100, "step": 50, "patience": 1}}, [100, 150]),
    ],
)
def test_presets_have_their_budget(prune, budgets):
    budget = (
        {"maximum": 400, "initial": 200, "minimum": 100} if prune["preset"] in ("off", "topd") else {"maximum": 400}
    )
    prune = {**prune, "budget": {**budget, **prune.get("budget", {})}}
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "c.jsonl"}}
    config = parse_config({**models, "prune": prune})
    made, used = make_budget(config), []
    for _ in range(2):
        used.append(made.current)
        if config.prune.moves_budget:
            made.update([1])
    assert used == budgets
