"""Whole runs on Transformer Engine layers (on the stand-in of tests/te_stand_in), and runs that change builds."""

from __future__ import annotations

import pytest

from tests.stand_in import with_stand_in
from tests.tiny_run import Case, TinyRun, run_cases

TE = "student.implementation=transformer_engine"
FP8 = (TE, "student.precision=bf16", "student.fp8=hybrid")


def test_runs_move_between_the_builds_and_train_in_fp8(tmp_path):
    """A run goes on in the other build as if nothing had happened; runs in FP8 finish."""
    run = TinyRun(tmp_path)
    cases = [
        Case("te", (TE, "train.steps=4")),
        Case("local_after_te", ("train.steps=4",), resumes=("te", 2)),
        Case("te_after_local", (TE, "train.steps=6"), resumes=("local_after_te", 4)),
        Case("local", ("train.steps=6",)),
        Case("fp8_recomputed", (*FP8, "student.recompute=full", "prune.preset=in_flight")),
        Case("delayed", (*FP8, "student.fp8_recipe=delayed")),
    ]
    for outcome in with_stand_in(2, run_cases, run.folder, cases)[0]:
        assert not outcome.error, outcome.error
    local = run.metrics(run.folder / "local")
    for name, first, last in (("te", 0, 4), ("local_after_te", 2, 4), ("te_after_local", 4, 6)):
        for ours, theirs in list(zip(run.metrics(run.folder / name), local))[first:last]:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), name
    for name in ("fp8_recomputed", "delayed"):
        steps = run.metrics(run.folder / name)
        assert len(steps) == 4 and not any("skipped" in s for s in steps), name
        assert steps[0]["overlap_mean"] == pytest.approx(local[0]["overlap_mean"], abs=0.15), name
