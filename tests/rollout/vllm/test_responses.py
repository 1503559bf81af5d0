"""Responses in generation: their candidates, their size, and how they reach every rank. Needs no vLLM."""

from __future__ import annotations

import pickle
import tracemalloc

import pytest
import torch
import torch.distributed as dist

from megatron_opd.rollout.vllm.common import EXTRA_CANDIDATES, RolloutError
from megatron_opd.rollout.vllm.responses import (
    Response,
    due_segments,
    share_rollouts,
    share_segments,
    top_candidates,
)
from tests.distributed import run_distributed
from tests.rollout.vllm.tiny import requests


def fill(response: Response, length: int, seed: int = 0) -> list[tuple[int, float, list[int], list[float]]]:
    """Appends so many positions, as vLLM gives them: candidates in any order. Returns what was appended."""
    generator = torch.Generator().manual_seed(seed)
    width = response.candidates.k + EXTRA_CANDIDATES
    made = []
    for _ in range(length):
        ids = (torch.randperm(width, generator=generator) * 1999 + len(made)).tolist()
        logprobs = (-torch.randint(40, (width,), generator=generator) / 8).tolist()  # with ties
        made.append((ids[0], logprobs[0], ids, logprobs))
        response.append(*made[-1])
    return made


def test_candidates_are_the_most_likely_with_ties_to_the_lowest_id():
    ids = torch.tensor([[9, 4, 7, 2, 8]])
    logprobs = torch.tensor([[-2.0, -1.0, -2.0, -2.0, -3.0]])
    top, values = top_candidates(ids, logprobs, 3)
    assert top.tolist() == [[4, 2, 7]] and values.tolist() == [[-1.0, -2.0, -2.0]]


def test_a_sampled_token_outside_the_top_is_not_a_candidate():
    response = Response(requests(1)[0], 2)
    response.append(30, -9.0, [30, 5, 6], [-9.0, -0.5, -1.0])
    response.append(5, -0.5, [5, 6, 8], [-0.5, -1.0, -2.0])
    response.finish("length")
    rollout = response.rollout(3)
    assert rollout.topk_ids.tolist() == [[5, 6], [5, 6]]
    assert rollout.logprobs.tolist() == [-9.0, -0.5] and rollout.policy_version == 3


@pytest.mark.parametrize("cut", [0, 5, 64, 100, 130, 150])
def test_a_response_holds_what_was_appended_also_after_a_cut(cut):
    """150 positions, forgotten from `cut` on and appended anew, against Python's own sort; a segment read midway."""
    k = 3
    response = Response(requests(1)[0], k)
    made = fill(response, 70)
    segment = response.next_segment(64)
    made += fill(response, 80, seed=1)
    response.truncate(cut)
    made = made[:cut] + fill(response, 40, seed=2)
    response.finish("eos")
    rollout = response.rollout(0)
    expected = [sorted(zip(ids, logprobs), key=lambda c: (-c[1], c[0]))[:k] for _, _, ids, logprobs in made]
    assert rollout.topk_ids.tolist() == [[i for i, _ in row] for row in expected]
    assert rollout.topk_logprobs.tolist() == [[v for _, v in row] for row in expected]
    assert rollout.tokens.tolist() == [token for token, *_ in made]
    assert rollout.logprobs.tolist() == [logprob for _, logprob, *_ in made]
    assert (segment.start, len(segment.tokens)) == (0, 64)
    kept = min(cut, 64)
    assert torch.equal(segment.topk_ids[:kept], rollout.topk_ids[:kept])


@pytest.mark.parametrize("count", [1, 2 + EXTRA_CANDIDATES + 2])
def test_too_few_or_too_many_candidates_are_refused(count):
    response = Response(requests(1)[0], 2)
    with pytest.raises(RolloutError, match=f"returned {count} candidates at a position, 2 were asked for"):
        response.append(1, -1.0, list(range(count)), [-1.0] * count)


@pytest.mark.parametrize("k", [1, 16, 64])
@pytest.mark.parametrize("finished", [False, True])
def test_a_token_takes_at_most_twenty_bytes_per_candidate(k, finished):
    tokens = 1000 + 9000 // k
    fill(Response(requests(1)[0], k), 100)  # what the first use leaves behind
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        response = Response(requests(1)[0], k)
        for start in range(0, tokens, 50):  # Python keeps a few of the tuples that a call has freed
            fill(response, 50, seed=start)
        if finished:
            response.finish("eos")
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 8 * k * tokens < held < 20 * k * tokens
    assert held > response.candidates.nbytes > 0.8 * held - 8 * tokens


def shared(rank: int, world_size: int) -> dict:
    """Ranks 0 and 1 own three responses each; rank 2 owns none."""
    group = dist.new_group(backend="gloo")
    asked = requests(6)
    by_index = {request.index: request for request in asked}
    mine = [Response(request, 4) for request in asked[3 * rank : 3 * rank + 3]]
    for response in mine:
        fill(response, 1000 + response.request.index, seed=response.request.index)
    pickled: list[int] = []
    original = dist.all_gather_object

    def counted(items, item, group=None):
        pickled.append(len(pickle.dumps(item)))
        return original(items, item, group=group)

    dist.all_gather_object = counted
    try:
        segments = share_segments(due_segments(mine, 512), rank < 2, by_index, group)
        for response in mine:
            response.finish("length")
        rollouts = share_rollouts(mine, rank < 2, by_index, 7, group)
    finally:
        dist.all_gather_object = original
    return {
        "segments": [(s.request is by_index[s.request.index], s.start, s.finished, s.topk_ids.sum()) for s in segments],
        "rollouts": [(r.index, r.end_reason, r.policy_version, r.prompt is by_index[r.index].prompt) for r in rollouts],
        "sums": [(r.tokens.sum(), r.topk_ids.sum(), r.topk_logprobs.sum(), r.logprobs.sum()) for r in rollouts],
        "dtypes": {(r.tokens.dtype, r.topk_ids.dtype, r.topk_logprobs.dtype, r.logprobs.dtype) for r in rollouts},
        "pickled": pickled,
    }


def test_every_rank_gets_every_response_and_no_tensor_is_pickled():
    results = run_distributed(3, shared)
    for result in results:
        assert result["segments"] == results[0]["segments"] and result["sums"] == results[0]["sums"]
        assert [s[:3] for s in result["segments"]] == [(True, 0, False)] * 6
        assert result["rollouts"] == [(i, "length", 7, True) for i in range(6)]
        assert result["dtypes"] == {(torch.int64, torch.int64, torch.float32, torch.float32)}
        assert max(result["pickled"]) < 1500  # a response's candidates alone are 48 kB
    for index, sums in enumerate(results[2]["sums"]):
        alone = Response(requests(6)[index], 4)
        fill(alone, 1000 + index, seed=index)
        alone.finish("length")
        rollout = alone.rollout(7)
        assert sums == (
            rollout.tokens.sum(),
            rollout.topk_ids.sum(),
            rollout.topk_logprobs.sum(),
            rollout.logprobs.sum(),
        )
