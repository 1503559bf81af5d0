"""Whose response is whose, and what it counts for: the worked numbers of several teachers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_opd.config import Config, ConfigError, parse_config
from megatron_opd.scoring.response_weights import Clipped, SequenceMean, TeacherShares, balanced, response_weights
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores

MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p.jsonl"}}
CODER = {"name": "coder", "model": "c", "sources": ["code", "sql"]}
TEACHERS = Teachers({"teacher": None, "coder": None}, {"code": "coder", "sql": "coder"})  # type: ignore[dict-item]


def batch(*responses: tuple[str, int, float]) -> ScoredBatch:
    """Responses by their source, length and distance: log q - log p of every token, which is its only candidate."""
    rollouts, scores = [], []
    for i, (source, n, distance) in enumerate(responses):
        own, ids = torch.full((n,), -2.0), torch.arange(n)
        rollouts.append(Rollout(Prompt(i, "", [1], source=source), i, ids, own, ids[:, None], own[:, None], "eos", 0))
        scores.append(TeacherScores((own + distance)[:, None], own + distance, {}, n))
    lengths = [n for _, n, _ in responses]
    weights = [torch.ones(n) for n in lengths]
    return ScoredBatch(rollouts, scores, weights, lengths, lengths, [0] * len(lengths), sum(lengths))


def mean(made: ScoredBatch, terms: list[float]) -> float:
    """What the step makes of one term a response: the weighted sum over the batch's tokens."""
    return sum(float(w.sum()) * term for w, term in zip(made.prune_weight, terms, strict=True)) / made.response_tokens


def test_a_prompts_source_names_its_teacher() -> None:
    given = batch(("sql", 2, 0.0), ("", 3, 0.0), ("code", 4, 0.0), ("math", 5, 0.0))
    assert TEACHERS.members(given.rollouts) == {"teacher": [1, 3], "coder": [0, 2]}
    assert TEACHERS.members(given.rollouts[:1]) == {"coder": [0]}  # a teacher without a response is not brought in


def test_the_mean_over_tokens_and_over_sequences() -> None:
    given = batch(("", 2, 0.0), ("", 8, 0.0))
    assert mean(given, [1.0, 0.1]) == pytest.approx(0.28)
    assert mean(SequenceMean().of(given), [1.0, 0.1]) == pytest.approx(0.55)
    assert all((w == 1).all() for w in given.prune_weight)


def test_the_mean_over_sequences_keeps_what_pruning_took() -> None:
    given = batch(("", 2, 0.0), ("", 8, 0.0))
    given.prune_weight[1][4:] = 0
    assert mean(SequenceMean().of(given), [1.0, 0.1]) == pytest.approx((1.0 + 0.05) / 2)


def test_shares_of_tokens() -> None:
    weights = balanced({"teacher": 2, "coder": 8}, {"teacher": 0.5, "coder": 0.5}, {}, 0)
    assert weights == pytest.approx({"teacher": 2.5, "coder": 0.625})
    assert 0.2 * weights["teacher"] + 0.8 * weights["coder"] == pytest.approx(1)


def test_disagreement_on_top_of_shares() -> None:
    weights = balanced({"teacher": 2, "coder": 8}, {"teacher": 0.5, "coder": 0.5}, {"teacher": 3.0, "coder": 1.0}, 1)
    assert weights == pytest.approx({"teacher": 3.75, "coder": 0.3125})
    assert 0.2 * weights["teacher"] + 0.8 * weights["coder"] == pytest.approx(1)


@pytest.mark.parametrize("exponent", [-1, 0.5, 2, 4])
def test_the_sum_of_the_weights_stays_with_any_exponent_and_distance(exponent: float) -> None:
    tokens, distance = {"a": 5, "b": 100, "c": 10_000}, {"a": 1e-6, "b": 0.3, "c": 40.0}
    weights = balanced(tokens, {"a": 0.5, "b": 0.2, "c": 0.3}, distance, exponent)
    assert sum(tokens[name] * weights[name] for name in tokens) == pytest.approx(sum(tokens.values()))
    assert all(weight > 0 for weight in weights.values())


def test_a_teacher_without_tokens_leaves_its_share() -> None:
    weights = balanced({"a": 2, "b": 8}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {}, 0)
    assert weights == pytest.approx({"a": 2.5, "b": 0.625})


def test_teachers_that_never_disagree_weigh_alike() -> None:
    assert balanced({"a": 2, "b": 8}, {}, {"a": 0.0, "b": 0.0}, 1) == {"a": 1, "b": 1}


def test_the_distance_is_a_running_mean_over_sampled_tokens_that_were_read() -> None:
    shares = TeacherShares(TEACHERS, {}, 1.0)
    made = shares.of(batch(("code", 3, -3.0), ("math", 3, 1.0)))
    assert shares.distance == pytest.approx({"teacher": 1.0, "coder": 3.0})
    assert shares.weights == pytest.approx({"teacher": 0.5, "coder": 1.5})
    assert [w.tolist() for w in made.prune_weight] == [[1.5] * 3, [0.5] * 3]
    later = batch(("code", 3, 1.0), ("code", 1, 5.0))
    later.scores[1] = TeacherScores(later.scores[1].logprobs, later.scores[1].sampled_logprobs, {}, 0)  # nobody read it
    shares.of(later)
    assert shares.distance == pytest.approx({"teacher": 1.0, "coder": 0.9 * 3 + 0.1 * 1})
    again = TeacherShares(TEACHERS, {}, 1.0)
    again.load_state_dict(shares.state_dict())
    assert again.distance == shares.distance


def test_rewards_and_stops_of_a_response_weigh_as_its_tokens_do() -> None:
    given = batch(("code", 2, -3.0), ("math", 8, 1.0))
    given.advantage = [torch.ones(2), torch.ones(8)]
    shares = TeacherShares(TEACHERS, {"teacher": 0.5, "coder": 0.5}, 0).of(given)
    assert [a.tolist() for a in shares.advantage] == [[2.5] * 2, [0.625] * 8]
    assert [a.tolist() for a in SequenceMean().of(given).advantage] == [[2.5] * 2, [0.625] * 8]


def test_a_clipped_advantage() -> None:
    made = Clipped(2.0).of(batch(("", 2, -25.0), ("", 1, 0.5), ("", 1, 9.0)))
    gaps = [float((s.sampled_logprobs - r.logprobs)[0]) for r, s in zip(made.rollouts, made.scores, strict=True)]
    assert gaps == [-2.0, 0.5, 2.0]
    assert [float((s.logprobs - r.topk_logprobs)[0, 0]) for r, s in zip(made.rollouts, made.scores)] == gaps


def config(**sections: Any) -> Config:
    return parse_config({**MODELS, **sections})


def test_each_key_names_its_weight_and_none_is_the_plain_run() -> None:
    def kinds(loss: dict[str, Any]) -> list[str]:
        return [type(t).__name__ for t in response_weights(config(teachers=[CODER], loss=loss), TEACHERS)]

    assert kinds({}) == []
    assert kinds({"mean": "sequence"}) == ["SequenceMean"]
    assert kinds({"teacher_shares": {"teacher": 1, "coder": 1}}) == kinds({"disagreement": 1}) == ["TeacherShares"]
    assert kinds({"advantage_clip": 5, "disagreement": 1, "mean": "sequence"}) == [
        "Clipped",
        "SequenceMean",
        "TeacherShares",
    ]


def test_the_names_of_teachers() -> None:
    made = config(teachers=[CODER, {"name": "writer", "model": "d", "sources": ["essays"]}])
    assert list(made.teacher_by_name) == ["teacher", "coder", "writer"]
    assert made.teacher_of_source == {"code": "coder", "sql": "coder", "essays": "writer"}
    assert config().teacher_of_source == {} and list(config().teacher_by_name) == ["teacher"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teachers": [CODER], "score": {"mode": "fused"}}, "score.mode: fused has one teacher"),
        ({"teachers": [CODER], "score": {"payload": "hidden"}}, "score.payload: hidden rebuilds one teacher's"),
        ({"teachers": [{**CODER, "name": "teacher"}]}, "the name 'teacher' is there twice"),
        ({"teachers": [CODER, {**CODER, "name": "other"}]}, "the source 'code' is there twice"),
        ({"teachers": [{**CODER, "sources": []}]}, "sources"),
        ({"teachers": [{**CODER, "name": "a b"}]}, "name"),
        ({"teachers": [CODER], "loss": {"teacher_shares": {"cook": 1}}}, "no teacher 'cook'; there are teacher, coder"),
        ({"teachers": [CODER], "loss": {"teacher_shares": {"coder": 1}}}, "'teacher' is missing"),
        ({"teachers": [CODER], "loss": {"teacher_shares": {"teacher": 0, "coder": 1}}}, "greater than 0"),
        (
            {"loss": {"kind": "full_reverse_kl", "advantage_clip": 5}, "score": {"payload": "hidden"}},
            "loss.advantage_clip: 5.0 bounds log-probs of candidates and sampled tokens",
        ),
        ({"loss": {"disagreement": 1}}, "loss.disagreement: 1.0 compares teachers, and there is one"),
        ({"loss": {"mean": "sequence"}, "score": {"mode": "fused"}}, "loss.mean: sequence needs the scores before"),
        (
            {"loss": {"kind": "sampled_reverse_kl", "advantage": "group", "mean": "sequence"}},
            "loss.mean: sequence sets the denominator",
        ),
        (
            {"teachers": [{**CODER, "system": "Code."}], "data": {"prompts": "p", "template": "none"}},
            r"teachers\[coder\].system: needs messages",
        ),
        (
            {"teachers": [{**CODER, "parallel": {"expert": 2}}], "prune": {"preset": "in_flight"}},
            r"teachers\[coder\].parallel.expert: 2",
        ),
    ],
)
def test_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**sections)
