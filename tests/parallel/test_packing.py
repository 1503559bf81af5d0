"""The plan of micro-batches, as a pure function."""

from __future__ import annotations

import random

import pytest

from megatron_opd.parallel.packing import attention_cost, plan_microbatches


def cases():
    rng = random.Random(0)
    for number in range(60):
        lengths = [rng.choice([0, 0, rng.randint(1, 40), rng.randint(1, 400)]) for _ in range(rng.randint(1, 60))]
        yield pytest.param(
            lengths, rng.choice([1, 2, 3, 4]), rng.choice([64, 256, 1000]), rng.choice([1, 2, 4]), id=str(number)
        )


@pytest.mark.parametrize("lengths, data_size, limit, pipeline", cases())
def test_every_plan_is_whole_and_within_its_limits(lengths, data_size, limit, pipeline):
    plan = plan_microbatches(lengths, data_size, limit, pipeline)
    assert plan == plan_microbatches(list(lengths), data_size, limit, pipeline)
    assert len(plan.microbatches) == data_size
    placed = [i for share in plan.microbatches for batch in share for i in batch]
    assert sorted(placed) == [i for i, n in enumerate(lengths) if n]  # each once, empty ones never
    for share in plan.microbatches:
        members = [i for batch in share for i in batch]
        assert all(list(batch) == sorted(batch) for batch in share)
        assert all(share) or not members  # no empty micro-batch among full ones
        assert len(share) >= min(pipeline, len(members))  # no stage idles where it need not
        for batch in share:
            assert sum(lengths[i] for i in batch) <= limit or len(batch) == 1
        # Few micro-batches: never more than twice what the tokens need, as each two together exceed the limit.
        tokens = sum(lengths[i] for i in members)
        assert len(share) <= max(2 * -(-tokens // limit), min(pipeline, len(members)), 1)


@pytest.mark.parametrize("data_size", [2, 3, 4])
def test_ranks_are_balanced_by_cost(data_size):
    rng = random.Random(data_size)
    lengths = [rng.randint(1, 4000) for _ in range(200)]
    plan = plan_microbatches(lengths, data_size, 8192)
    costs = [sum(attention_cost(lengths[i]) for batch in share for i in batch) for share in plan.microbatches]
    assert max(costs) <= min(costs) + max(attention_cost(n) for n in lengths)
    assert max(costs) / min(costs) < 1.02


def test_a_long_sequence_costs_more_than_its_tokens():
    lengths = [32768] + [1024] * 32
    shares = plan_microbatches(lengths, 2, 32768).microbatches
    assert [sum(lengths[i] for b in s for i in b) for s in shares] == [32768, 32768]  # all short ones against it


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("sequences", [0, 1, 3, 7, 16])
def test_counts_are_multiples_for_the_interleaved_schedule(sequences, multiple):
    plan = plan_microbatches([10] * sequences, 2, 25, pipeline=2, multiple_of=multiple)
    assert all(len(share) % multiple == 0 and share for share in plan.microbatches)
    assert sorted(i for s in plan.microbatches for b in s for i in b) == list(range(sequences))


def test_equal_counts_over_replicas():
    lengths = [100] + [1] * 8
    counts = {len(s) for s in plan_microbatches(lengths, 3, 3, equal_counts=True).microbatches}
    assert len(counts) == 1
    assert len({len(s) for s in plan_microbatches(lengths, 3, 3).microbatches}) > 1


def test_a_replica_without_sequences_has_one_empty_microbatch():
    assert plan_microbatches([5], 2, 10).microbatches == (((0,),), ((),))
    assert plan_microbatches([0, 0], 2, 10).microbatches == (((),), ((),))
