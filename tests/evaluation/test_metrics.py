"""avg@k, pass@k, maj@k and their intervals against slow definitions."""

from __future__ import annotations

import itertools

import pytest

from megatron_opd.evaluation.metrics import JudgedResponse, bootstrap_interval, majority, pass_at_k, summarize


def answer(uid=0, sample=0, correct=False, extracted="x", length=10, truncated=False, score=None, problem=None):
    return JudgedResponse(
        uid, sample, correct, float(correct) if score is None else score, extracted, length, truncated, problem
    )


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (5, 2, 3), (6, 6, 1), (6, 5, 2), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_enough_answers():
    with pytest.raises(ValueError, match="pass@5 needs 1 to 4 responses"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(True, "1/2"), (True, "0.5"), (False, "3")], 1.0),  # one answer, written in two ways
        ([(True, "1"), (False, "3"), (False, " 3 ")], 0.0),
        ([(True, "1"), (False, "3")], 0.5),
        ([(True, "1"), (False, "3"), (False, "4")], 1 / 3),
        ([(True, "1"), (False, None), (False, None)], 1.0),  # no answer, no vote
        ([(False, None), (False, None)], 0.0),
    ],
)
def test_majority(answers, expected):
    assert majority([answer(sample=i, correct=c, extracted=e) for i, (c, e) in enumerate(answers)]) == pytest.approx(
        expected
    )


def test_bootstrap_interval_is_seeded_and_covers_what_it_should():
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    # normal approximation: 0.3 +- 1.96 * sqrt(0.21 / 100)
    assert low == pytest.approx(0.3 - 0.0898, abs=0.015) and high == pytest.approx(0.3 + 0.0898, abs=0.015)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_summary():
    rows = [
        answer(0, 0, True, "1", 10),
        answer(0, 1, False, "2", 20),
        answer(0, 2, False, "2", 30, True),
        answer(0, 3, True, "1", 40),
        answer(1, 0, False, None, 50, True, problem="late"),
        answer(1, 1, False, "7", 50, score=0.5),
        answer(1, 2, True, "8", 100),
        answer(1, 3, True, "8", 100),
    ]
    got = summarize(rows, 4, seed=1)
    assert got["accuracy"] == got["avg@4"] == got["pass@1"] == 0.5
    assert got["pass@2"] == pytest.approx(1 - 1 / 6)
    assert got["pass@4"] == 1.0
    assert got["maj@4"] == 0.75  # a tie, and a clear majority
    assert got["maj@4_low"] <= got["maj@4"] <= got["maj@4_high"]
    assert got["score"] == pytest.approx(4.5 / 8)
    assert (got["prompts"], got["responses"], got["length_mean"]) == (2, 8, 50)
    assert (got["truncated"], got["no_answer"], got["verifier_problems"]) == (0.25, 0.125, 1)


def test_summary_of_three_answers_has_pass_at_three():
    got = summarize([answer(0, i, i == 0) for i in range(3)], 3)
    assert {k for k in got if k.startswith("pass@") and "_" not in k} == {"pass@1", "pass@2", "pass@3"}


def test_summary_refuses_missing_answers():
    with pytest.raises(ValueError, match="prompt 5 has 1 responses, not 2"):
        summarize([answer(5)], 2)
    with pytest.raises(ValueError, match="no responses"):
        summarize([], 2)
