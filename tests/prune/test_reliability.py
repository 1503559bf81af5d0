"""Drift events to prune weights and effective lengths: one-shot, by segments, and across context-parallel ranks."""

import pytest
import torch

from megatron_opd.prune import ReliabilityState, from_events, prefix_event_counts, reliability
from tests import reference
from tests.distributed import groups_of_two_and_four, run_distributed


def _batch(responses=6, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(9, 17, (responses, tokens), generator=generator)
    shared[0] = 0  # an event at every token
    shared[1] = 16  # none
    lengths = torch.tensor([tokens, tokens, 0, 1, 99, 250])[:responses, None]
    return shared / 16, torch.arange(tokens) < lengths


def _check(result, overlap, mask, w_drop, w_base, threshold=0.7):
    for b in range(len(overlap)):
        events = [o < threshold for o in overlap[b].tolist()]
        want = reference.reliability(events, mask[b].tolist(), w_drop, w_base)
        assert result.events[b].tolist() == want["events"]
        torch.testing.assert_close(result.weight[b], torch.tensor(want["weight"]), rtol=0, atol=1e-7)
        torch.testing.assert_close(result.loss_weight[b], torch.tensor(want["loss_weight"]), rtol=0, atol=1e-7)
        assert int(result.effective_length[b]) == want["effective_length"]


@pytest.mark.parametrize("w_drop", [0.01, 0.07, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("w_base", [0.5, 0.0])
def test_matches_the_definition_in_exact_arithmetic(w_drop, w_base):
    overlap, mask = _batch()
    result = reliability(overlap, mask, w_drop=w_drop, w_base=w_base)
    _check(result, overlap, mask, w_drop, w_base)
    if w_base == 0.0:
        assert torch.equal(result.loss_weight, result.weight)


def test_is_exactly_spent_at_the_hundredth_event():
    result = reliability(torch.zeros(1, 120), torch.ones(1, 120))
    assert result.weight[0, 98] > 0.009 and result.weight[0, 99] == 0.0
    assert result.weight[0, 0] == torch.tensor(0.99), "the event's own token is already decayed"
    assert result.loss_weight[0, 99] == 0.5
    assert int(result.effective_length) == 99
    for events in (3, 7, 49, 93):  # 1 / n has no exact binary form
        weight = reliability(torch.zeros(1, events), torch.ones(1, events), w_drop=1 / events).weight
        assert weight[0, -1] == 0.0 and (weight[0, :-1] > 0).all()


def test_twelve_of_sixteen_is_agreement_and_eleven_is_drift():
    overlap = torch.tensor([[12 / 16, 11 / 16]])
    assert reliability(overlap, torch.ones(1, 2)).events.tolist() == [[False, True]]
    seven_of_ten = torch.full((1, 1), 7.0) / 10
    assert not reliability(seven_of_ten, torch.ones(1, 1)).events.any(), "exactly at the threshold is no event"


def test_nothing_outside_the_mask_counts():
    overlap, mask = torch.zeros(2, 10), torch.zeros(2, 10)
    mask[0, 4:6] = 1  # a prompt before it, padding behind
    overlap[1] = torch.nan  # never measured
    result = reliability(overlap, mask)
    assert result.total_events.tolist() == [2, 0] and result.effective_length.tolist() == [2, 0]
    assert result.loss_weight[0].count_nonzero() == 2 and result.loss_weight[1].count_nonzero() == 0


def test_other_signals_share_the_arithmetic():
    overlap, mask = _batch()
    ours, theirs = reliability(overlap, mask, w_drop=0.02), from_events(overlap < 0.7, mask, w_drop=0.02)
    assert torch.equal(ours.loss_weight, theirs.loss_weight)
    assert torch.equal(ours.effective_length, theirs.effective_length)


@pytest.mark.parametrize("segment", [1, 37, 128, 400])
def test_segments_give_what_the_whole_gives(segment):
    overlap, mask = _batch()
    whole, state = reliability(overlap, mask), ReliabilityState(len(overlap))
    parts = [state.update(o, m) for o, m in zip(overlap.split(segment, 1), mask.split(segment, 1))]
    for name in ("weight", "loss_weight", "events"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name)), name
    assert torch.equal(state.effective_length, whole.effective_length)
    assert state.spent.tolist() == [int(n) >= 100 for n in whole.total_events]


def test_spent_responses_can_stay_out_of_later_segments():
    overlap, mask = _batch()
    whole, state = reliability(overlap, mask), ReliabilityState(len(overlap))
    alive = torch.arange(len(overlap))
    calls = 0
    for o, m in zip(overlap.split(50, 1), mask.split(50, 1)):
        calls += len(alive)
        state.update(o[alive], m[alive], alive)
        alive = alive[~state.spent[alive]]
    assert torch.equal(state.effective_length, whole.effective_length), "a spent response has nothing left to count"
    assert 0 not in alive.tolist() and calls < 6 * 8


def test_errors_say_what_to_fix():
    overlap, mask = _batch()
    with pytest.raises(ValueError, match=r"overlap and mask must both be \[B, T\]"):
        reliability(overlap[0], mask)
    with pytest.raises(ValueError, match="w_drop must not be negative"):
        reliability(overlap, mask, w_drop=-0.1)
    with pytest.raises(ValueError, match="w_base must not be negative"):
        ReliabilityState(3, w_base=-0.1)
    overlap[0, 3] = torch.nan
    with pytest.raises(ValueError, match="overlap is NaN on 1 response token"):
        reliability(overlap, mask)
    with pytest.raises(ValueError, match="6 segments for 3 responses"):
        ReliabilityState(3).update(torch.ones(6, 4), torch.ones(6, 4))


def _zigzag(whole, rank, cp):
    chunks = whole.chunk(2 * cp, dim=1)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim=1)


def _context_parallel(global_rank, world):
    for cp, group in groups_of_two_and_four(global_rank).items():
        _check_context_parallel(global_rank % cp, cp, group)


def _check_context_parallel(rank, cp, group):
    overlap, mask = _batch()
    o, m = _zigzag(overlap, rank, cp), _zigzag(mask, rank, cp)
    local = reliability(o, m, w_drop=0.02, group=group)
    whole = reliability(overlap, mask, w_drop=0.02)
    for name in ("weight", "loss_weight", "events"):
        assert torch.equal(getattr(local, name), _zigzag(getattr(whole, name), rank, cp)), name
    assert torch.equal(local.effective_length, whole.effective_length)
    events = (overlap < 0.7) & mask
    counts = events.long().cumsum(1)
    assert torch.equal(prefix_event_counts(_zigzag(events, rank, cp), group), _zigzag(counts, rank, cp))
    try:
        prefix_event_counts(torch.zeros(1, 3), group)
    except ValueError as error:
        assert "two chunks of equal length, got 3" in str(error)
    else:
        raise AssertionError("an odd local length cannot be two chunks")


def test_context_parallel_ranks_agree_with_the_whole():
    run_distributed(4, _context_parallel)
