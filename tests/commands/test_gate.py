"""`megatron-opd gate`: bounds against a run; what is missing fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_opd.cli import main
from megatron_opd.commands.gate import load_gate
from tests.tiny_run import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
STEPS = [
    {"step": 1, "loss": 0.9, "step_s": 2.0, "rollout_s": 1.0, "overlap_mean": None},
    {"step": 2, "loss": 0.5, "step_s": 2.0, "rollout_s": 0.5, "accuracy": {"aime": 0.25}},
    {"step": 3, "loss": 0.3, "step_s": 4.0, "rollout_s": 1.5},
]


@pytest.fixture
def gated(tmp_path, capsys):
    """Writes a run and a gate, and returns the exit code and what was printed."""

    def run(gate, steps=STEPS):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        (tmp_path / "gate.yaml").write_text(yaml.safe_dump(gate))
        code = main(["gate", str(tmp_path), str(tmp_path / "gate.yaml")])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def test_a_run_within_its_bounds(gated):
    code, said = gated(
        {
            "steps": 3,
            "metrics": {"loss": {"last": 2, "minimum": 0.39, "maximum": 0.41}},
            "accuracy": {"aime": {"minimum": 0.25}},
            "phases": {"rollout": {"minimum": 0.374, "maximum": 0.376}},  # 3 s of 8 s
        }
    )
    assert code == 0, said
    assert "all bounds hold" in said and "loss, mean of the last 2" in said and "0.4" in said


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        ({"steps": 4}, "BROKEN  steps"),
        ({"steps": 3, "metrics": {"loss": {"maximum": 0.29}}}, "BROKEN  loss"),
        ({"steps": 3, "metrics": {"loss": {"minimum": 0.31}}}, "BROKEN  loss"),
        ({"steps": 3, "accuracy": {"aime": {"minimum": 0.3}}}, "BROKEN  accuracy of aime"),
        ({"steps": 3, "phases": {"rollout": {"maximum": 0.3}}}, "BROKEN  time share of rollout"),
    ],
)
def test_a_broken_bound_is_named(gated, gate, line):
    code, said = gated(gate)
    assert code == 1 and line in said and "bounds are broken" in said


@pytest.mark.parametrize(
    "gate",
    [
        {"steps": 3, "metrics": {"grad_norm": {"maximum": 1}}},
        {"steps": 3, "metrics": {"overlap_mean": {"last": 3, "minimum": 0}}},
        {"steps": 3, "accuracy": {"amc": {"minimum": 0}}},
        {"steps": 3, "phases": {"sync": {"maximum": 1}}},
    ],
)
def test_what_the_run_lacks_breaks_the_bound(gated, gate):
    code, said = gated(gate)
    assert code == 1 and "missing" in said


def test_nan_lies_within_no_bounds(gated):
    code, said = gated(
        {"steps": 1, "metrics": {"loss": {"maximum": 9}}}, [{"step": 1, "step_s": 1, "loss": float("nan")}]
    )
    assert code == 1 and "nan" in said


def test_a_run_without_a_step_breaks_every_bound(gated):
    assert gated({"steps": 1, "phases": {"train": {"maximum": 1}}}, [])[0] == 1


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({}, "steps: Field required"),
        ({"steps": 3, "metrics": {"loss": {}}}, "metrics.loss: Value error, give a minimum, a maximum or both"),
        ({"steps": 3, "metrics": {"loss": {"most": 1}}}, "metrics.loss.most: Extra inputs"),
        ({"steps": 3, "metrics": {"loss": {"minimum": 2, "maximum": 1}}}, "minimum: 2.0 is above maximum: 1.0"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(gated, gate, message):
    code, said = gated(gate)
    assert code == 2 and message in said


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys):
    (tmp_path / "gate.yaml").write_text("steps: 1\n")
    assert main(["gate", str(tmp_path / "run"), str(tmp_path / "gate.yaml")]) == 2
    assert "give a run_dir" in capsys.readouterr().err


@pytest.mark.parametrize("folder", sorted(p for p in EXAMPLES.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_every_recipe_has_a_readme_and_a_gate(folder: Path):
    assert (folder / "README.md").is_file()
    recipes = [p for p in folder.glob("*.yaml") if "student" in (yaml.safe_load(p.read_text()) or {})]
    gates = [p for p in folder.glob("gate*.yaml")]
    assert recipes and gates
    for gate in gates:
        bounds = load_gate(gate)
        assert bounds.metrics and bounds.phases


def test_every_gate_asks_for_numbers_that_the_documentation_knows():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    known = set(re.findall(r"`(\w+)`", page[page.index("## What a curve means") :]))
    for path in EXAMPLES.glob("*/gate*.yaml"):
        gate = load_gate(path)
        assert not set(gate.metrics) - known, path
        assert not {f"{name}_s" for name in gate.phases} - known, path
