"""Time limits of verifiers that no slow machine can miss."""

from __future__ import annotations

import pytest

from megatron_opd.evaluation import verifiers

HANGING = ("hang", "spin", "\\boxed{9^{9^{9^{9}}}}")  # responses whose verification never ends


@pytest.fixture(autouse=True)
def only_hanging_responses_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's time limit holds for HANGING; every other response has ten minutes for its verdict."""
    score = verifiers._Worker.score

    def patient(worker: verifiers._Worker, case: verifiers.Case, timeout_s: float) -> verifiers.Verdict:
        return score(worker, case, timeout_s if case.response in HANGING else 600.0)

    monkeypatch.setattr(verifiers._Worker, "score", patient)
