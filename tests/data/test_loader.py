"""The order of prompts, its continuation, and its parts for data-parallel ranks."""

from __future__ import annotations

import json

import pytest

from megatron_opd.data.loader import PromptLoader
from megatron_opd.data.prompts import PromptSet
from megatron_opd.data.sources import DataError
from megatron_opd.types import Prompt


def prompt_set(size=10, shift=0):
    return PromptSet("p.jsonl", [Prompt(i, str(i), [i + shift]) for i in range(size)], size, 0, 0)


def uids(batch):
    return [p.uid for p in batch]


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own():
    loader = PromptLoader(prompt_set(), seed=1)
    epochs = [uids(loader.next_batch(10)) for _ in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (uids(PromptLoader(prompt_set(), seed).next_batch(25)) for seed in (1, 1, 2))
    assert first == again != other
    assert first[:10] == [5, 9, 6, 1, 8, 2, 3, 4, 7, 0]  # pinned: a changed order would break resumed runs
    unshuffled = PromptLoader(prompt_set(3), seed=1, shuffle=False)
    assert uids(unshuffled.next_batch(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("sizes", [[1] * 30, [7, 7, 7, 7, 2], [30]])
def test_batch_size_does_not_change_the_order(sizes):
    loader = PromptLoader(prompt_set(), seed=5)
    assert [u for n in sizes for u in uids(loader.next_batch(n))] == uids(PromptLoader(prompt_set(), 5).next_batch(30))


@pytest.mark.parametrize("before", [0, 4, 10, 13, 27])
def test_a_saved_position_goes_on_exactly_there(before):
    loader = PromptLoader(prompt_set(), seed=5)
    loader.next_batch(before)
    state = json.loads(json.dumps(loader.state_dict()))  # a checkpoint keeps plain values
    expected = uids(loader.next_batch(21))
    resumed = PromptLoader(prompt_set(), seed=5)
    resumed.next_batch(3)
    resumed.load_state_dict(state)
    assert uids(resumed.next_batch(21)) == expected


def test_resuming_in_other_data_is_refused_with_both_values():
    old, new = PromptLoader(prompt_set(), seed=5), PromptLoader(prompt_set(shift=1), seed=5)
    both = f"fingerprint was {old.prompts.fingerprint} when saved and is {new.prompts.fingerprint} now"
    with pytest.raises(DataError, match=both):
        new.load_state_dict(old.state_dict())
    with pytest.raises(DataError, match="seed was 5 when saved and is 6 now"):
        PromptLoader(prompt_set(), seed=6).load_state_dict(old.state_dict())
    with pytest.raises(DataError, match="shuffle was True when saved and is False now"):
        PromptLoader(prompt_set(), seed=5, shuffle=False).load_state_dict(old.state_dict())


def test_no_prompts_is_an_error():
    with pytest.raises(DataError, match="p.jsonl: no prompts"):
        PromptLoader(prompt_set(0), seed=1)
