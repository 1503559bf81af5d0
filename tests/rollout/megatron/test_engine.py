"""Generation in the training ranks: the same tokens on every layout, and transformers' numbers for them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.models.cached import GIB, block_bytes
from megatron_opd.models.paged import CacheFull
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.rollout.megatron.sampler import sample
from megatron_opd.types import Prompt, Rollout
from tests.distributed import run_distributed
from tests.layouts import parallel_student, student_model
from tests.models.tiny_families import VOCAB, make
from tests.rollout.begun import assert_goes_on, drop_waiting, go_on

LAYOUTS = ("tp1", "tp2_sp", "pp2", "tp2_sp_pp2", "vpp2")  # in a world of four: data parallelism 4, 2, 2, 1, 2
EOS = {7, 50, 93}
K = 8
BUDGET = 24
SAMPLING = Sampling(max_tokens=BUDGET, seed=5, top_logprobs=K)
VARIANTS = {
    "plain": SAMPLING,
    "greedy": Sampling(max_tokens=BUDGET, temperature=0.0, top_logprobs=K),
    "filtered": Sampling(max_tokens=BUDGET, temperature=0.7, top_p=0.8, top_k=20, seed=6, top_logprobs=K),
}


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(i, "", torch.randint(VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate((3, 1, 12, 5, 8))
    ]
    return [Request(prompts[i // 2], i) for i in range(9)]


def as_lists(rollouts: list[Rollout]) -> list[tuple]:
    return [(r.index, r.tokens.tolist(), r.end_reason, r.policy_version) for r in rollouts]


class Watcher:
    """Remembers segments; names the answers to stop once they have so many tokens."""

    def __init__(self, stop_at: dict[int, int]) -> None:
        self.stop_at, self.seen, self.finished = stop_at, {}, set()

    def __call__(self, segments) -> set[int]:
        stop = set()
        for s in segments:
            tokens = self.seen.setdefault(s.request.index, [])
            assert s.start == len(tokens), "segments must be contiguous"
            assert s.request.index not in self.finished
            assert s.topk_ids.shape == s.topk_logprobs.shape == (len(s.tokens), K)
            tokens += s.tokens.tolist()
            if s.finished:
                self.finished.add(s.request.index)
            if len(tokens) >= self.stop_at.get(s.request.index, math.inf):
                stop.add(s.request.index)
        return stop


def refusal(student) -> str:
    engine = MegatronEngine(student, EOS, max_batch=64, cache_gib=0.5 * block_bytes(student) / GIB)
    with pytest.raises(CacheFull) as raised:
        engine.generate(requests(), SAMPLING)
    return str(raised.value)


def generate(rank: int, world: int, directory: str):
    found = {}
    for layout in LAYOUTS:
        with student_model(directory, layout) as student:
            engine = MegatronEngine(student, EOS, max_batch=64)
            engine.update_parameters(lambda: iter(()), version=3)
            variants = {name: engine.generate(requests(), s) for name, s in VARIANTS.items()}
            small = MegatronEngine(student, EOS, max_batch=2)
            small.policy_version = 3
            bound = 2.5 * block_bytes(student) / GIB  # two blocks: two of these requests at their longest
            bounded = MegatronEngine(student, EOS, max_batch=64, cache_gib=bound)
            bounded.policy_version = 3
            never, some = Watcher({}), Watcher({0: 6, 3: 1, 8: 12})
            watched = engine.generate(requests(), SAMPLING, never, segment=7)
            assert {i: t for i, t in never.seen.items()} == {r.index: r.tokens.tolist() for r in watched}
            assert never.finished == set(range(9))
            stopped = small.generate(requests(), SAMPLING, some, segment=4)
            found[layout] = {
                "rollouts": variants,
                "small": as_lists(small.generate(requests(), SAMPLING)),
                "bounded": as_lists(bounded.generate(requests(), SAMPLING)),
                "watched": as_lists(watched),
                "stopped": as_lists(stopped),
                "refused": refusal(student),
                "begun": go_on(small, requests(), variants["plain"], SAMPLING),
                "dropped": drop_waiting(small, requests(), SAMPLING),
                "probe": engine.probe([1, 2, 3, 4, 5]),
                "mode": student.chunks[0].training,
                "sequence": student.config.sequence_parallel,
            }
    with student_model(directory, "tp1") as student, pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_opd.rollout.megatron.engine.PREFILL_TOKENS", 10)
        engine = MegatronEngine(student, EOS, max_batch=64)
        engine.policy_version = 3
        found["in_turns"] = as_lists(engine.generate(requests(), SAMPLING))
    found["sampled"] = sampled_tokens()
    return found


def distribution() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 2


DISTRIBUTIONS = {
    "plain": Sampling(1, seed=1),
    "temperature": Sampling(1, temperature=0.5, seed=2),
    "top_p": Sampling(1, top_p=0.7, seed=3),
    "top_k": Sampling(1, top_k=5, seed=4),
    "all": Sampling(1, temperature=1.5, top_k=30, top_p=0.9, seed=5),
}
DRAWS = 20_000


def sampled_tokens() -> dict[str, torch.Tensor]:
    """Many draws from one distribution, sharded over two tensor ranks with a large value behind the vocabulary."""
    with parallel_student("tp2") as layout:
        padded = torch.cat([distribution(), torch.tensor([50.0])])
        shard = padded.view(2, -1)[layout.groups.tp.rank()].repeat(DRAWS, 1)
        index, position = torch.arange(DRAWS) // 100, torch.arange(DRAWS) % 100
        return {n: sample(shard, s, index, position, VOCAB, layout.groups.tp).tokens for n, s in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(make("qwen3", tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def results(directory):
    return run_distributed(4, generate, directory)


@pytest.fixture(scope="module")
def reference(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logprobs_of(reference, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """[T, V] log-probs that transformers gives at each response position."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_same_tokens_on_every_layout_and_rank(results):
    for name in VARIANTS:
        expected = as_lists(results[0]["tp1"]["rollouts"][name])
        assert len({tuple(t) for _, t, _, _ in expected}) > 4
        for found in results:
            for layout in LAYOUTS:
                assert as_lists(found[layout]["rollouts"][name]) == expected, (layout, name)


def test_logprobs_and_candidates_are_those_of_transformers(results, reference):
    for layout in LAYOUTS:
        for name in VARIANTS:
            for r in results[1][layout]["rollouts"][name]:
                expected = logprobs_of(reference, r.prompt.tokens, r.tokens.tolist())
                torch.testing.assert_close(r.logprobs, expected.gather(1, r.tokens[:, None])[:, 0], atol=1e-5, rtol=0)
                values, ids = expected.topk(K)
                torch.testing.assert_close(r.topk_logprobs, values, atol=1e-5, rtol=0)
                assert torch.equal(r.topk_ids, ids)


def test_greedy_is_greedy(results, reference):
    for request, r in zip(requests(), results[0]["pp2"]["rollouts"]["greedy"]):
        tokens: list[int] = []
        while len(tokens) < BUDGET and not EOS & set(tokens):
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([request.prompt.tokens + tokens])).logits[0, -1].argmax()))
        assert r.tokens.tolist() == tokens


def test_answers_end_at_eos_or_budget(results):
    rollouts = results[0]["tp1"]["rollouts"]["plain"]
    assert [r.index for r in rollouts] == list(range(9))
    assert {r.end_reason for r in rollouts} == {"eos", "length"}
    for r in rollouts:
        tokens = r.tokens.tolist()
        assert not EOS & set(tokens[:-1])
        assert (tokens[-1] in EOS) == (r.end_reason == "eos")
        assert len(tokens) == BUDGET or r.end_reason == "eos"
        assert r.policy_version == 3


def test_waiting_requests_and_watching_change_nothing(results):
    for layout in LAYOUTS:
        expected = as_lists(results[0]["tp1"]["rollouts"]["plain"])
        assert results[0][layout]["small"] == expected
        assert results[0][layout]["bounded"] == expected
        assert results[0][layout]["watched"] == expected


def test_a_request_that_can_never_fit_is_refused_by_name(results):
    for found in results:
        for layout in LAYOUTS:
            assert re.search(
                r"rollout\.cache_gib: \S+ is too small: .* take \S+ GiB on a rank; set it to \S+ or more, or lower "
                r"the budget",
                found[layout]["refused"],
            )


def test_the_watch_stops_answers(results):
    plain = as_lists(results[0]["tp1"]["rollouts"]["plain"])
    for found in results:
        for layout in LAYOUTS:
            for (index, tokens, reason, _), (_, whole, whole_reason, _) in zip(found[layout]["stopped"], plain):
                assert tokens == whole[: len(tokens)]
                least = {0: 6, 3: 1, 8: 12}.get(index)
                if least is None or len(whole) <= least:
                    assert (tokens, reason) == (whole, whole_reason)
                elif len(tokens) < len(whole):
                    assert reason == "drift" and least <= len(tokens) <= least + 5
    assert [r for i, _, r, _ in results[0]["tp1"]["stopped"] if i in (0, 3)] == ["drift", "drift"]


def test_a_response_goes_on_where_an_earlier_step_has_left_it(results):
    for layout in LAYOUTS:
        assert_goes_on(results[0][layout]["begun"], tolerance=1e-5)


def test_many_long_prompts_are_read_in_turns(results):
    """The same tokens as at once: see PREFILL_TOKENS."""
    assert results[0]["in_turns"] == as_lists(results[0]["tp1"]["rollouts"]["plain"])


def test_a_waiting_request_that_is_stopped_has_no_tokens(results):
    for layout in LAYOUTS:
        lengths = results[0][layout]["dropped"]
        assert lengths.count(0) >= 1 and max(lengths) > 0


def test_probe_gives_the_models_logprobs(results, reference):
    with torch.no_grad():
        expected = reference(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor([[2], [3], [4], [5]]))[:, 0]
    for found in results:
        for layout in LAYOUTS:
            torch.testing.assert_close(found[layout]["probe"], expected, atol=1e-5, rtol=0)


def test_generation_leaves_the_model_as_it_was(results):
    for layout in LAYOUTS:
        assert results[0][layout]["mode"] is True
        assert results[0][layout]["sequence"] == ("sp" in layout)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_filtered_distribution(results, name):
    sampling = DISTRIBUTIONS[name]
    values, order = distribution().double().sort(descending=True)
    probs = (values / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs[sampling.top_k :] = 0
        probs /= probs.sum()
    inside, mass = torch.zeros(VOCAB, dtype=torch.bool), 0.0
    for i in range(VOCAB):
        inside[i] = mass < sampling.top_p
        mass += float(probs[i])
    probs = torch.where(inside, probs, 0.0)
    probs /= probs.sum()
    counts = results[0]["sampled"][name].bincount(minlength=VOCAB)[order].double()
    assert int(counts[probs == 0].sum()) == 0
    spread = (DRAWS * probs * (1 - probs)).sqrt()
    assert ((counts - DRAWS * probs).abs() <= 5 * spread + 3).all()
    for found in results:
        assert torch.equal(found["sampled"][name], results[0]["sampled"][name])
