"""Responses that go on in a later step (rollout.carry_over: finished), so that no step waits for its longest one.

More prompts are under way than a step trains on. A step ends its generation as soon as enough responses have ended;
the others go on in the next step, before new prompts start, behind the tokens that they have: the engine reads them
again with its new parameters. A response is trained on once, whole, when it has ended; the oldest first.

`CarryOver` stands in the engine's place: it picks what is trained on in a step from what the engine has generated.
Everything that it decides follows from the responses' lengths and ends, which are the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_opd.config import Config, ConfigError
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment, Watch
from megatron_opd.rollout.lengths import Lengths
from megatron_opd.types import END_LENGTH, UNFINISHED, Prompt, Rollout

_COLUMNS = ("tokens", "logprobs", "topk_ids", "topk_logprobs", "versions")


@dataclass(frozen=True)
class UnderWay:
    """A response from the step that has drawn its prompt to the step that trains on it."""

    prompt: Prompt
    group: int  # number of its prompt in the order of drawing; a prompt's responses stand together
    started: int  # step that has drawn it, which is the policy version of its first token, or an older one
    rewarded: bool
    rollout: Rollout | None = None  # what there is of it; None: nothing yet

    @property
    def ended(self) -> bool:
        return self.rollout is not None and self.rollout.end_reason != UNFINISHED


class CarryOver(RolloutEngine):
    """See the module's docstring. `generate` returns the responses to train on alone, under their requests' indices."""

    def __init__(self, engine: RolloutEngine, config: Config) -> None:
        self.engine, self.config = engine, config
        self.segment = config.prune.segment
        self.whole_groups = config.prune.after_drift == "grpo" or config.loss.advantage == "group"
        self.under_way: list[UnderWay] = []  # the oldest first; in a step, at the index of its request
        self.drawn = 0  # prompts
        self.step = 0
        self.lengths = Lengths()

    def draw(self, next_prompts: Callable[[int], list[Prompt]], step: int) -> list[Request]:
        """The step's requests: what is under way, and as many new prompts as `oversubscribe` asks for. In the last
        steps no more start than will be trained on."""
        train, self.step = self.config.train, step
        copies, most = train.responses_per_prompt, self.config.rollout.oversubscription * train.prompts_per_step
        target = min(math.ceil(most), train.prompts_per_step * (train.steps - step))
        fresh = max(0, -(-(target * copies - len(self.under_way)) // copies))
        share = self.config.prune.reward_prompts(train.prompts_per_step)
        for prompt in next_prompts(fresh):
            rewarded = self.drawn % train.prompts_per_step < share
            self.under_way += [UnderWay(prompt, self.drawn, step, rewarded)] * copies
            self.drawn += 1
        self.lengths.start(step, fresh * copies)
        return [Request(u.prompt, i, u.rollout, u.rewarded) for i, u in enumerate(self.under_way)]

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        """Generates until enough responses have ended, and until those have that may wait no longer. `watch` sees a
        response from its first token on, also where an earlier step has generated it."""
        self._end_what_is_full(sampling.max_tokens)
        before = {i for i, u in enumerate(self.under_way) if u.ended}
        running = [r for r in requests if r.index not in before]
        self.tokens_sampled = None
        look = _Look(running, watch, before, self._enough)
        if not running or self._enough(before):
            self.tokens_sampled = 0
        elif watch is not None or len(requests) > self.batch:
            self._go_on(self.engine.generate(running, sampling, look, segment if watch else self.segment), look.stopped)
        else:
            self._go_on(self.engine.generate(running, sampling), set())
        if self.tokens_sampled is None:
            self.tokens_sampled = self.engine.tokens_sampled
        taken = self._take({i for i, u in enumerate(self.under_way) if u.ended})
        rollouts = []
        for i in taken:
            rollout = self.under_way[i].rollout
            assert rollout is not None  # it has ended
            rollouts.append(replace(rollout, index=i))
            self.lengths.train(self.step, self.under_way[i].started, len(rollout))
        if watch is not None and (unseen := [_whole(requests[i], r) for i, r in zip(taken, rollouts) if i in before]):
            watch(unseen)
        self.under_way = [u for i, u in enumerate(self.under_way) if i not in set(taken)]
        return rollouts

    @property
    def batch(self) -> int:
        """Responses that a step trains on."""
        return self.config.train.prompts_per_step * self.config.train.responses_per_prompt

    def metrics(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Of the step that is trained on `rollouts`; lags are in policy versions."""
        lags = torch.cat([self.step - versions_of(r) for r in rollouts]).double()
        lengths = torch.tensor([len(r) for r in rollouts], dtype=torch.float64)
        left = [0 if u.rollout is None else len(u.rollout) for u in self.under_way]
        return {
            "carried": len(left),
            "carried_tokens": sum(left),
            "version_lag_mean": float(lags.mean()),
            "version_lag_max": int(lags.max()),
            "responses_effective": float(lengths.sum() ** 2 / lengths.square().sum()),
        } | self.lengths.metrics(self.step, [(u.started, n) for u, n in zip(self.under_way, left, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """All but `tensors`, for JSON."""
        return {
            "copies": self.config.train.responses_per_prompt,
            "drawn": self.drawn,
            "lengths": self.lengths.state_dict(),
            "responses": [
                {
                    "uid": u.prompt.uid,
                    "group": u.group,
                    "started": u.started,
                    "rewarded": u.rewarded,
                    "tokens": None if u.rollout is None else len(u.rollout),
                    "end": None if u.rollout is None else u.rollout.end_reason,
                    "version": None if u.rollout is None else u.rollout.policy_version,
                }
                for u in self.under_way
            ],
        }

    def tensors(self) -> dict[str, Tensor]:
        """What is there of all responses, one behind the other; nothing where there is nothing."""
        rollouts = [u.rollout for u in self.under_way if u.rollout is not None]
        if not rollouts:
            return {}
        columns = {name: torch.cat([getattr(r, name) for r in rollouts]) for name in _COLUMNS[:-1]}
        return columns | {"versions": torch.cat([versions_of(r) for r in rollouts])}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor], prompts: Sequence[Prompt]) -> None:
        """Goes on with what `state_dict` and `tensors` hold of a run on these prompts.

        Raises ConfigError where the config has changed so that these responses no longer go into one batch.
        """
        copies, k = self.config.train.responses_per_prompt, self.config.kept_candidates
        left = "responses are under way in the checkpoint; restore it, or drop them with rollout.carry_over: off"
        if state["copies"] != copies:
            raise ConfigError(f"train.responses_per_prompt: {copies}, but {state['copies']} of each prompt's {left}")
        if tensors and (saved := tensors["topk_ids"].shape[1]) != k:
            raise ConfigError(f"prune.k, loss.k: {k} candidates are kept, but with {saved} each {left}")
        self.drawn = state["drawn"]
        self.lengths.load_state_dict(state["lengths"])
        by_uid = {prompt.uid: prompt for prompt in prompts}
        sizes = [saved["tokens"] or 0 for saved in state["responses"]]
        split = {name: column.split(sizes) for name, column in tensors.items()}
        self.under_way = []
        for i, saved in enumerate(state["responses"]):
            prompt, rollout = by_uid[saved["uid"]], None
            if saved["tokens"] is not None:
                parts = {name: split[name][i] for name in _COLUMNS}
                rollout = Rollout(prompt, i, end_reason=saved["end"], policy_version=saved["version"], **parts)
            self.under_way.append(UnderWay(prompt, saved["group"], saved["started"], saved["rewarded"], rollout))

    # ---- the engine's own

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        self.engine.update_parameters(named_parameters, version)

    def probe(self, tokens: list[int]) -> Tensor:
        return self.engine.probe(tokens)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        self.engine.close()

    # ---- what ends and what is taken

    def _end_what_is_full(self, budget: int) -> None:
        """The budget may have shrunk below what a response has: it ends as it is."""
        for i, u in enumerate(self.under_way):
            if u.rollout is not None and not u.ended and len(u.rollout) >= budget:
                self.under_way[i] = replace(u, rollout=replace(u.rollout, end_reason=END_LENGTH))

    def _go_on(self, rollouts: list[Rollout], stopped: set[int]) -> None:
        """Adds what the engine has generated. `stopped`: they ended for this step alone."""
        for r in rollouts:
            if r.index in stopped:
                r = replace(r, end_reason=UNFINISHED)
            u = self.under_way[r.index]
            joined = r if u.rollout is None else joined_of(u.rollout, r)
            self.under_way[r.index] = replace(u, rollout=joined if len(joined) else None)

    def _enough(self, ended: set[int]) -> bool:
        """Whether the step has what it trains on, and nothing that is due goes on."""
        due = {i for i, u in enumerate(self.under_way) if self.step - u.started >= self._patience}
        return due <= ended and len(self._take(ended)) >= min(self.batch, len(self.under_way))

    @property
    def _patience(self) -> int:
        """Steps after which a response is generated to its end: the last of those that are due together are trained on
        `oversubscribe` - 2 steps later, and then have the largest lag that is allowed."""
        ahead = math.ceil(self.config.rollout.oversubscription) - 1
        return self.config.rollout.max_version_lag + 1 - max(ahead, 1)

    def _take(self, ended: set[int]) -> list[int]:
        """What is trained on of the responses that have ended: the oldest; whole prompts where they are a group."""
        if not self.whole_groups:
            return sorted(ended)[: self.batch]
        groups: dict[int, list[int]] = {}
        for i, u in enumerate(self.under_way):
            groups.setdefault(u.group, []).append(i)
        whole = [members for members in groups.values() if ended.issuperset(members)]
        return [i for members in whole[: self.config.train.prompts_per_step] for i in members]


class _Look:
    """What the engine calls with new segments. Ends the step's generation once enough responses have ended."""

    def __init__(
        self, running: list[Request], watch: Watch | None, ended: set[int], enough: Callable[[set[int]], bool]
    ) -> None:
        self.requests = {r.index: r for r in running}
        self.watch, self.enough = watch, enough
        self.ended = set(ended)
        self.stopped: set[int] = set()  # that go on in the next step

    def __call__(self, segments: list[Segment]) -> set[int]:
        stop = self.watch([self._from_its_start(s) for s in segments]) if self.watch is not None else set()
        self.ended |= stop | {s.request.index for s in segments if s.finished}
        if self.enough(self.ended):
            self.stopped = self.requests.keys() - self.ended
        return stop | self.stopped

    def _from_its_start(self, segment: Segment) -> Segment:
        """The first segment of a response that goes on, with what an earlier step has generated before it."""
        request = self.requests[segment.request.index]
        begun = request.begun
        if begun is None or segment.start > len(begun):
            return segment
        return Segment(
            request,
            0,
            torch.cat([begun.tokens, segment.tokens]),
            torch.cat([begun.topk_ids, segment.topk_ids]),
            torch.cat([begun.topk_logprobs, segment.topk_logprobs]),
            segment.finished,
        )


def _whole(request: Request, rollout: Rollout) -> Segment:
    """A response that ended before this step, for a watch that has not seen it."""
    return Segment(request, 0, rollout.tokens, rollout.topk_ids, rollout.topk_logprobs, finished=True)


def versions_of(rollout: Rollout) -> Tensor:
    """The policy version of each token, [T] int32."""
    if rollout.versions is not None:
        return rollout.versions
    return torch.full((len(rollout),), rollout.policy_version, dtype=torch.int32)


def joined_of(begun: Rollout, more: Rollout) -> Rollout:
    """A response with what the engine has added to it."""
    if not len(more):
        return replace(begun, end_reason=more.end_reason)
    return replace(
        more,
        tokens=torch.cat([begun.tokens, more.tokens]),
        logprobs=torch.cat([begun.logprobs, more.logprobs]),
        topk_ids=torch.cat([begun.topk_ids, more.topk_ids]),
        topk_logprobs=torch.cat([begun.topk_logprobs, more.topk_logprobs]),
        versions=torch.cat([versions_of(begun), versions_of(more)]),
    )
