"""The response budget against 203 steps of a real run, and across a resume."""

import csv
from pathlib import Path

import pytest
import torch

from megatron_opd.prune import ResponseBudget

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
    resumed.load_state_dict(budget.state_dict())
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


def test_a_checkpoint_with_other_settings_wins_loudly_and_a_broken_one_is_refused():
    budget = ResponseBudget(initial=2048, minimum=1024, maximum=4096, step=50)
    budget.update_from_hit_ratio(1.0)
    other = _paper()
    with pytest.warns(UserWarning, match="maximum 12288 -> 4096, step 100 -> 50"):
        other.load_state_dict(budget.state_dict())
    assert other.state_dict() == budget.state_dict() and other.current == 2098
    with pytest.raises(ValueError, match="missing .'current'., unknown .'now'."):
        other.load_state_dict({"now" if k == "current" else k: v for k, v in budget.state_dict().items()})
    with pytest.raises(ValueError, match="current 99 outside 1024..4096"):
        other.load_state_dict({**budget.state_dict(), "current": 99})
    with pytest.raises(ValueError, match="no_hit_steps 3 outside 0..2"):
        other.load_state_dict({**budget.state_dict(), "no_hit_steps": 3})
