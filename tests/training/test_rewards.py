"""Rewards past the drift point: refused where none can arise, said before the run, watched during it."""

from __future__ import annotations

import pytest
import torch

from megatron_opd.config import Config, ConfigError, parse_config
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.rollout.base import Request
from megatron_opd.training import rewards as module
from megatron_opd.training.rewards import PastDriftRewards
from megatron_opd.types import Prompt, Rollout, ScoredBatch
from tests.data.make_tokenizers import make_sentencepiece

PRUNE = {"preset": "in_flight", "after_drift": "grpo", "grpo_share": 0.5}


def config(verifier: str = "exact", **sections: dict) -> Config:
    values = {
        "student": {"model": "a"},
        "teacher": {"model": "b"},
        "data": {"prompts": "c.jsonl", "verifier": verifier},
        "train": {"prompts_per_step": 2, "responses_per_prompt": 2},
        "prune": PRUNE,
    }
    return parse_config({**values, **{name: {**values.get(name, {}), **own} for name, own in sections.items()}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"responses_per_prompt": 1}}, "train.responses_per_prompt: 1 leaves"),
        ({"prune": {"grpo_share": 0.2}}, "prune.grpo_share: 0.2 of train.prompts_per_step: 2 rounds to no prompt"),
        ({"prune": {"grpo_share": 0}}, "rounds to no prompt"),
        ({"prune": {"grpo_coefficient": 0}}, "prune.grpo_coefficient: 0"),
        ({"prune": {"w_drop": 0}}, "never comes to a drift point"),
        ({"prune": {"threshold": 0}}, "never comes to a drift point"),
        ({"rollout": {"temperature": 0}}, "needs sampling"),
        ({"rollout": {"top_k": 1}}, "needs sampling"),
    ],
)
def test_a_config_that_leaves_no_reward_is_refused(sections: dict, message: str) -> None:
    assert config().prune.reward_prompts(2) == 1
    with pytest.raises(ConfigError, match=message):
        config(**sections)
    plain = {**sections, "prune": {"preset": "off", "after_drift": "drop"}}
    config(**plain)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_sentencepiece(tmp_path_factory.mktemp("sp")))


@pytest.fixture
def make(tokenizer):
    made: list[PastDriftRewards] = []

    def rewards(verifier: str) -> tuple[PastDriftRewards, list[str]]:
        said: list[str] = []
        made.append(PastDriftRewards(config(verifier), tokenizer, said.append))
        return made[-1], said

    yield rewards
    for one in made:
        one.close()


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(i, "?", [5], answer) for i, answer in enumerate(answers)]


def test_a_verifier_that_fails_on_every_reference_answer_ends_the_run_before_it_begins(make) -> None:
    rewards, said = make("no.such:verifier")
    with pytest.raises(ConfigError, match="data.verifier: verifier no.such:verifier cannot start"):
        rewards.check(prompts("1"))
    rewards, said = make("tests.evaluation.own_verifiers:of_verl")
    with pytest.raises(
        ConfigError, match="data.verifier: .*of_verl failed on the reference answer of each of 2 prompts"
    ):
        rewards.check(prompts("1", "2"))
    rewards, said = make("tests.evaluation.own_verifiers:never")
    rewards.check(prompts("1", "2"))
    assert said == [said[0]] and "accepts the reference answer of none of 2 prompts" in said[0]
    rewards, said = make("exact")
    rewards.check(prompts("1", "2", None))
    assert said == []


def batch(tokenizer, texts: list[str], effective: list[int]) -> tuple[ScoredBatch, list[Request]]:
    rollouts, requests = [], []
    for i, text in enumerate(texts):
        tokens, none = torch.tensor(tokenizer.encode(text)), torch.zeros(0)
        prompt = Prompt(i // 2, "?", [5], "12")
        rollouts.append(Rollout(prompt, i, tokens, none, none, none, "eos", 0))
        requests.append(Request(prompt, i, rewarded=prompt.uid < 1))
    weights = [torch.ones(len(r)) for r in rollouts]
    return ScoredBatch(rollouts, [], weights, list(effective), effective, [0] * len(texts), 1), requests


def test_rewards_are_measured(make, tokenizer) -> None:
    rewards, said = make("exact")
    scored, requests = batch(tokenizer, ["12", "134", "12", "12"], [1, 1, 1, 1])
    assert rewards.add_to(scored, requests) == {"reward_mean": 0.5, "reward_tokens": 1 + 2, "reward_problems": 0}
    assert [int(a.count_nonzero()) for a in scored.advantage] == [1, 2, 0, 0]  # the share is one prompt of two
    scored, requests = batch(tokenizer, ["12", "134", "12", "12"], [2, 3, 1, 1])  # nobody passes the drift point
    assert rewards.add_to(scored, requests)["reward_tokens"] == 0
    assert said == []


def test_rewards_that_teach_nothing_are_said_once(make, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3)
    rewards, said = make("exact")
    steps = []
    for texts in (["12", "12"], ["1", "2"], ["12", "1"], *[["1", "2"]] * 5):
        scored, requests = batch(tokenizer, texts + ["12", "12"], [1, 0, 1, 1])
        steps.append(rewards.add_to(scored, requests).get("warning"))
    assert steps[:5] == [None] * 5 and steps[6:] == [None] * 2
    assert "no token has learnt from a reward in 3 steps" in steps[5]
    assert said == [f"WARNING: prune.after_drift: grpo: {steps[5]}"]


def test_a_verifier_that_fails_on_every_response_is_said_at_once(make, tokenizer) -> None:
    rewards, said = make("tests.evaluation.own_verifiers:of_verl")
    for step in range(2):
        scored, requests = batch(tokenizer, ["12", "1", "12", "12"], [1, 0, 1, 1])
        metrics = rewards.add_to(scored, requests)
        assert metrics["reward_problems"] == 2 and ("warning" in metrics) is (step == 0)
    assert len(said) == 1 and "failed on every response: the verifier failed: TypeError" in said[0]
