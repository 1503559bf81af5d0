"""What is trained on in which step, with an engine whose responses have lengths that the test has chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.config import Config, ConfigError, parse_config
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment, Watch
from megatron_opd.rollout.carry_over import CarryOver, joined_of, versions_of
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, UNFINISHED, Prompt, Rollout

K = 3


class Scripted(RolloutEngine):
    """Token t of the response to prompt u is 1000 u + t; a response has `length[u]` of them. `slots` run at once."""

    def __init__(self, length: Callable[[int], int], slots: int = 99) -> None:
        self.length, self.slots = length, slots
        self.steps = 0  # decode steps of the last `generate`

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        has = {r.index: r.generated for r in requests}
        by_index = {r.index: r for r in requests}
        ended: dict[int, str] = {}
        waiting, running, self.tokens_sampled, self.steps = [r.index for r in requests], [], 0, 0
        while running or waiting:
            while waiting and len(running) < self.slots:
                running.append(waiting.pop(0))
            segments = []
            self.steps += segment
            for i in list(running):
                whole = self.length(by_index[i].prompt.uid)
                new = min(has[i] + segment, whole, sampling.max_tokens) - has[i]
                assert new > 0, "a response that has ended was asked for"
                if has[i] + new == min(whole, sampling.max_tokens):
                    ended[i] = END_EOS if has[i] + new == whole else END_LENGTH
                    running.remove(i)
                table = torch.zeros(new, K)
                tokens = self._tokens(by_index[i], has[i], new)
                segments.append(Segment(by_index[i], has[i], tokens, table.long(), table, i in ended))
                has[i] += new
                self.tokens_sampled += new
            for i in watch(segments) if watch else ():
                if i not in ended:
                    ended[i] = END_DRIFT
                    running = [j for j in running if j != i]
                    waiting = [j for j in waiting if j != i]
        return [self._rollout(r, has[r.index], ended[r.index]) for r in requests]

    def _tokens(self, request: Request, start: int, count: int) -> Tensor:
        return 1000 * request.prompt.uid + torch.arange(start, start + count)

    def _rollout(self, request: Request, length: int, end: str) -> Rollout:
        count = length - request.generated
        table = torch.zeros(count, K)
        tokens = self._tokens(request, request.generated, count)
        version = self.policy_version
        return Rollout(request.prompt, request.index, tokens, torch.zeros(count), table.long(), table, end, version)

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        self.policy_version = version

    def probe(self, tokens: list[int]) -> Tensor:
        return torch.zeros(len(tokens) - 1)


class Prompts:
    """Endless new prompts, each with the number it was drawn as."""

    def __init__(self) -> None:
        self.drawn = 0
        self.every = [Prompt(i, "", [5]) for i in range(500)]

    def __call__(self, count: int) -> list[Prompt]:
        self.drawn += count
        return self.every[self.drawn - count : self.drawn]


def minimal_config(**sections: Any) -> Config:
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    return parse_config({**models, **sections, "data": {"prompts": "p.jsonl"} | sections.get("data", {})})


def config(prompts: int = 2, copies: int = 2, steps: int = 100, **sections: Any) -> Config:
    rollout = {"carry_over": "finished"} | sections.pop("rollout", {})
    prune = {"k": K, "segment": 4} | sections.pop("prune", {})
    train = {"prompts_per_step": prompts, "responses_per_prompt": copies, "steps": steps}
    return minimal_config(rollout=rollout, prune=prune, train=train, **sections)


def run(
    carry: CarryOver, prompts: Prompts, steps: range, budget: int = 64, watch: Watch | None = None
) -> list[list[Rollout]]:
    trained = []
    for step in steps:
        carry.update_parameters(lambda: iter(()), step)
        requests = carry.draw(prompts, step)
        trained.append(carry.generate(requests, Sampling(budget, top_logprobs=K), watch, 4))
        carry.metrics(trained[-1])
    return trained


def check(trained: list[list[Rollout]], batch: int, lag: int, length: Callable[[int], int], budget: int = 64) -> None:
    """Every step has a whole batch of whole responses, none older than is allowed, none twice."""
    seen: dict[int, int] = {}
    for step, rollouts in enumerate(trained):
        assert len(rollouts) == batch
        for r in rollouts:
            whole = min(length(r.prompt.uid), budget)
            assert r.tokens.tolist() == (1000 * r.prompt.uid + torch.arange(whole)).tolist()
            versions = versions_of(r)
            assert len(versions) == len(r.topk_ids) == len(r.logprobs) == whole
            assert versions.tolist() == sorted(versions.tolist()) and 0 <= step - int(versions[0]) <= lag
            assert r.policy_version == int(versions[-1]) and r.end_reason in (END_EOS, END_LENGTH)
            seen[r.prompt.uid] = seen.get(r.prompt.uid, 0) + 1
    assert len(set(seen.values())) <= 2


def mixed(uid: int) -> int:
    return 60 if uid % 3 == 0 else 5 + uid % 4


@pytest.mark.parametrize(("oversubscribe", "lag"), [(1.5, 4), (2.0, 1), (2.0, 2), (3.0, 2), (4.0, 3), (5.0, 4)])
@pytest.mark.parametrize("whole_prompts", [False, True])
def test_each_step_has_its_batch_and_no_response_is_older_than_allowed(
    oversubscribe: float, lag: int, whole_prompts: bool
) -> None:
    rollout = {"oversubscribe": oversubscribe, "max_version_lag": lag}
    loss = {"kind": "sampled_reverse_kl", "advantage": "group"} if whole_prompts else {}
    carry, steps = CarryOver(Scripted(mixed, slots=5), config(rollout=rollout, loss=loss, steps=40)), range(40)
    prompts = Prompts()
    trained = run(carry, prompts, steps)
    check(trained, 4, lag, mixed)
    assert carry.under_way == [] and prompts.drawn == 40 * 2, "the last steps start no more than they train on"
    if whole_prompts:
        for rollouts in trained:
            uids = [r.prompt.uid for r in rollouts]
            assert uids == [uids[0]] * 2 + [uids[2]] * 2 and uids[0] != uids[2]


def test_a_step_does_not_wait_for_its_longest_response() -> None:
    def waited(carry_over: bool) -> int:
        engine = Scripted(mixed)
        carry = CarryOver(engine, config(rollout={"oversubscribe": 2.0 if carry_over else 1.0}, steps=30))
        prompts, total = Prompts(), 0
        for step in range(30):
            run(carry, prompts, range(step, step + 1))
            total += engine.steps
            engine.steps = 0
        return total

    assert waited(True) < 0.7 * waited(False)


def test_what_a_step_trains_on_is_the_oldest_that_has_ended() -> None:
    carry = CarryOver(Scripted(lambda uid: 40 if uid == 1 else 3), config(copies=1, rollout={"oversubscribe": 2.0}))
    trained = run(carry, Prompts(), range(6))
    assert [[r.prompt.uid for r in rollouts] for rollouts in trained[:2]] == [[0, 2], [3, 4]]
    at = next(step for step, rollouts in enumerate(trained) if any(r.prompt.uid == 1 for r in rollouts))
    assert 1 < at <= 4 and trained[at][0].prompt.uid == 1
    assert len(set(versions_of(trained[at][0]).tolist())) > 1


def test_one_steps_worth_under_way_is_the_engine_alone() -> None:
    asked = []

    class Recorded(Scripted):
        def generate(self, requests: list[Request], *arguments: Any) -> list[Rollout]:
            asked.append((requests, arguments))
            return super().generate(requests, *arguments)

    carry = CarryOver(Recorded(mixed), config(rollout={"oversubscribe": 1.0}))
    (rollouts,) = run(carry, Prompts(), range(1))
    requests, arguments = asked[0]
    assert arguments == (Sampling(64, top_logprobs=K),)  # no watch where none is asked for
    assert [(r.prompt.uid, r.index, r.begun) for r in requests] == [(i // 2, i, None) for i in range(4)]
    assert all(r.versions is None for r in rollouts)


def test_the_watch_sees_every_response_from_its_first_token_on_once() -> None:
    for step_trained in run_watched():
        assert step_trained


def run_watched() -> Iterator[bool]:
    carry = CarryOver(Scripted(mixed, slots=3), config(rollout={"oversubscribe": 2.0}))
    prompts = Prompts()
    for step in range(12):
        seen: dict[int, list[int]] = {}
        finished: set[int] = set()

        def watch(segments: list[Segment], seen: Any = seen, finished: Any = finished) -> set[int]:
            for s in segments:
                tokens = seen.setdefault(s.request.index, [])
                assert s.start == len(tokens) and s.request.index not in finished
                assert len(s.tokens) == len(s.topk_ids) == len(s.topk_logprobs)
                tokens += s.tokens.tolist()
                if s.finished:
                    finished.add(s.request.index)
            return set()

        (rollouts,) = run(carry, prompts, range(step, step + 1), watch=watch)
        yield all(seen[r.index] == r.tokens.tolist() and r.index in finished for r in rollouts)


def test_a_response_that_the_watch_stops_has_ended() -> None:
    def watch(segments: list[Segment]) -> set[int]:
        return {s.request.index for s in segments if s.request.prompt.uid % 3 == 0}

    carry = CarryOver(Scripted(mixed), config(rollout={"oversubscribe": 1.5}))
    ends = [(r.prompt.uid % 3, r.end_reason) for step in run(carry, Prompts(), range(5), watch=watch) for r in step]
    assert (0, END_DRIFT) in ends and {end for uid, end in ends if uid} == {END_EOS}


def test_a_budget_that_shrinks_ends_what_is_longer() -> None:
    carry = CarryOver(Scripted(lambda uid: 60 if uid == 0 else 3), config(copies=1, rollout={"oversubscribe": 2.0}))
    prompts = Prompts()
    run(carry, prompts, range(1), budget=64)
    (long,) = [u for u in carry.under_way if u.prompt.uid == 0]
    assert long.rollout is not None and long.rollout.end_reason == UNFINISHED and len(long.rollout) == 4
    (rollouts,) = run(carry, prompts, range(1, 2), budget=3)
    assert (rollouts[0].prompt.uid, len(rollouts[0]), rollouts[0].end_reason) == (0, 4, END_LENGTH)


def test_rewarded_prompts_keep_their_share() -> None:
    """The first of every two prompts that are drawn, however many a step draws."""
    sections = {
        "prune": {"preset": "in_flight", "after_drift": "grpo", "grpo_share": 0.5},
        "data": {"verifier": "exact"},
    }
    carry = CarryOver(Scripted(mixed), config(rollout={"oversubscribe": 1.5}, **sections))
    prompts, rewarded = Prompts(), {}
    for step in range(6):
        requests = carry.draw(prompts, step)
        rewarded |= {r.prompt.uid: r.rewarded for r in requests}
        carry.generate(requests, Sampling(64, top_logprobs=K))
    assert [rewarded[uid] for uid in sorted(rewarded)] == [uid % 2 == 0 for uid in sorted(rewarded)]


def test_lags_are_counted_in_policy_versions() -> None:
    """The oracle of shared/reference/methods.md, section 1.1: 6 tokens of version 3, 4 of version 5, trained at 6."""
    table = torch.zeros(6, K)
    first = Rollout(Prompt(0, "", [5]), 0, torch.arange(6), torch.zeros(6), table.long(), table, UNFINISHED, 3)
    more = Rollout(Prompt(0, "", [5]), 0, torch.arange(4), torch.zeros(4), table[:4].long(), table[:4], END_EOS, 5)
    whole = joined_of(first, more)
    assert whole.versions is not None and whole.versions.tolist() == [3] * 6 + [5] * 4
    assert (whole.end_reason, whole.policy_version, len(whole.first(7).versions)) == (END_EOS, 5, 7)
    carry = CarryOver(Scripted(mixed), config())
    carry.step = 6
    carry.lengths.start(6, 1)
    metrics = carry.metrics([whole])
    assert metrics["version_lag_mean"] == pytest.approx(2.2) and metrics["version_lag_max"] == 3
    assert metrics["responses_effective"] == pytest.approx(1.0)


def test_a_checkpoint_has_all_that_is_under_way() -> None:
    settings = config(rollout={"oversubscribe": 2.0})
    prompts = Prompts()
    plain = CarryOver(Scripted(mixed, slots=3), settings)
    run(plain, prompts, range(5))
    state, tensors = json.loads(json.dumps(plain.state_dict())), plain.tensors()
    again = CarryOver(Scripted(mixed, slots=3), settings)
    again.load_state_dict(state, tensors, prompts.every)
    other = Prompts()
    other.drawn = prompts.drawn
    for one, two in zip(run(plain, prompts, range(5, 12)), run(again, other, range(5, 12)), strict=True):
        assert [(r.prompt.uid, r.index, r.tokens.tolist()) for r in one] == [
            (r.prompt.uid, r.index, r.tokens.tolist()) for r in two
        ]
    assert plain.state_dict() == again.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 3}, "train.responses_per_prompt: 3, but 2 of each prompt's responses are under way"),
        ({"prune": {"k": 5}}, "prune.k, loss.k: 5 candidates are kept, but with 3 each responses are under way"),
    ],
)
def test_a_resume_that_cannot_go_on_is_refused(changes: dict[str, Any], message: str) -> None:
    prompts = Prompts()
    carry = CarryOver(Scripted(mixed), config(rollout={"oversubscribe": 2.0}))
    run(carry, prompts, range(2))
    other = CarryOver(Scripted(mixed), config(rollout={"oversubscribe": 2.0}, **changes))
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(carry.state_dict(), carry.tensors(), prompts.every)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"carry_over": "finished", "engine": "mine:Engine"}, "engine: mine:Engine is your own"),
        ({"oversubscribe": 2.0}, "oversubscribe: 2.0 is of carry_over: finished alone"),
        ({"carry_over": "finished", "oversubscribe": 4, "max_version_lag": 2}, "set oversubscribe: 3 or less"),
    ],
)
def test_what_does_not_go_together_is_refused(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minimal_config(rollout=rollout)
