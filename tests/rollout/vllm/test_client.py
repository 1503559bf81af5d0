"""The server mode's routing, retries and version checks, against stand-in servers that fail on command.

The stand-ins speak the part of vLLM's HTTP interface that is used (taken from a vLLM 0.32 server's own answers) and
"generate" tokens that depend on the seed and the position alone.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from megatron_opd.config import RolloutConfig, VllmConfig
from megatron_opd.rollout.base import Sampling
from megatron_opd.rollout.vllm import client
from megatron_opd.rollout.vllm.common import RolloutError, agreeing_probe, buckets, request_seed
from megatron_opd.rollout.vllm.files import TransferFiles
from megatron_opd.rollout.vllm.server import VllmServerEngine
from tests.rollout.vllm.tiny import Watcher, requests, texts

EOS = 7
SAMPLING = Sampling(max_tokens=24, seed=1, top_logprobs=2)


WRONG = (
    '{"choices": [{"finish_reason": null, "token_ids": [5]}]}',
    '{"choices": [{"finish_reason": null, "token_ids": [5], "logprobs": {"content": [{}]}}]}',
    '{"choices": [{"finish_reason": null, "token_ids": 5, "logprobs": null}]}',
    '{"choices": {"a": 1}}',
    '{"choice": []}',
    '{"choices": [{"finish_reason": "length", "weight_versions": 7}]}',
    '{"choices": [{"finish_reason": null, "token_ids": [5], "logprobs": {"content": [{"token_id": "5"}]}}]}',
)


class StandIn:
    """A server on a free port of this machine. `shift` changes its tokens; see `broken` for what can go wrong."""

    def __init__(self, key: str = "", shift: int = 0):
        self.key, self.shift = key, shift
        self.version, self.files = "default", []
        self.broken = ""  # "die": cut answers after `after` tokens; "stall": stop sending; "500"; "stale"
        self.after = 0
        self.served, self.running, self.most_running = 0, 0, 0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.handle_call(None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                self.handle_call(json.loads(self.rfile.read(length)) if length else None)

            def handle_call(self, body):
                stand_in.answer(self, body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler, body):
        path = handler.path.split("?")[0]
        if self.key and path != "/health" and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self.reply(handler, {"error": "Unauthorized"}, 401)
        if self.broken == "500":
            return self.reply(handler, {"error": "broken"}, 500)
        if path == "/inference/v1/generate":
            with self.lock:
                self.served += 1
                self.running += 1
                self.most_running = max(self.most_running, self.running)
            try:
                return self.generate(handler, body)
            finally:
                with self.lock:
                    self.running -= 1
        if path == "/update_weights":
            self.files.append(body["update_info"]["path"])
        if path == "/update_weight_version":
            self.version = body["new_version"]
        version = "somebody-else:1" if self.broken == "stale" else self.version
        self.reply(handler, {"weight_version": version, "success": True, "world_size": 2})

    def reply(self, handler, value, status=200):
        text = json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def generate(self, handler, body):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        if self.broken in WRONG:
            handler.wfile.write(f"data: {self.broken}\n\n".encode())
            return
        with suppress(OSError):  # the client has enough
            while self.broken == "endless":
                handler.wfile.write(b"data: {" * 10_000)
        sampling = body["sampling_params"]
        for i in range(sampling["max_tokens"]):
            if self.broken == "die" and i >= self.after:
                return
            if self.broken == "stall" and i >= self.after:
                self.gate.clear()
            self.gate.wait()
            token = (sampling["seed"] + 31 * i + self.shift * (i >= 10)) % 400 + 50
            content = [{"token_id": token, "logprob": -1.0, "top_logprobs": self.candidates(token)}]
            last = i + 1 == sampling["max_tokens"]
            choice = {
                "finish_reason": "length" if last else None,
                "token_ids": [token],
                "logprobs": {"content": content},
            }
            if last:
                choice["weight_versions"] = [{"version": self.version, "start": 0, "end": i + 1}]
            handler.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            handler.wfile.flush()

    def candidates(self, token):
        return [{"token_id": (token + j) % 450, "logprob": -1.0 - j} for j in range(6)]

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def servers():
    made = [StandIn(), StandIn()]
    yield made
    for server in made:
        server.close()


def server_config(servers: list[str], max_batch: int = 4, bucket_mb: int = 512, **keys) -> RolloutConfig:
    vllm = VllmConfig(mode="server", servers=servers, **{"server_timeout_s": 300.0, "server_retries": 2, **keys})
    return RolloutConfig(engine="vllm", max_batch=max_batch, bucket_mb=bucket_mb, vllm=vllm)


def build(servers, **keys):
    engine = VllmServerEngine(server_config([server.url for server in servers], **keys), {EOS}, 128, "fp32")
    engine.update_parameters(parameters, 0)
    return engine


def parameters():
    return iter([("a", torch.ones(600_000)), ("b", torch.ones(600_000)), ("c", torch.ones(3))])


def expected(count):
    return [([(request_seed(1, index) + 31 * i) % 400 + 50 for i in range(24)], "length") for index in range(count)]


def test_load_is_spread_and_bounded(servers):
    engine = build(servers)
    for server in servers:
        server.gate.clear()  # no response goes on until each server has its four

    def open_when_both_are_full():
        while not all(server.running == 4 for server in servers):
            time.sleep(0.01)
        for server in servers:
            server.gate.set()

    threading.Thread(target=open_when_both_are_full, daemon=True).start()
    assert texts(engine.generate(requests(40), SAMPLING)) == expected(40)
    assert servers[0].served + servers[1].served == 40
    assert all(server.most_running == 4 for server in servers)
    assert engine.tokens_sampled == sum(len(tokens) for tokens, _ in expected(40))
    engine.close()


def test_parameters_travel_in_files_of_bounded_size_that_close_removes(servers, tmp_path):
    engine = build(servers, bucket_mb=3, transfer_dir=str(tmp_path))
    assert servers[0].files == servers[1].files and len(servers[0].files) == 2  # 2.4 MB each, and one of 12 bytes
    engine.update_parameters(parameters, 1)
    assert len(servers[0].files) == 4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # those of the newest version alone
    engine.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("failure", ["die", "stall", "500", "stale"])
def test_answers_of_a_failing_replica_finish_on_the_other(servers, failure, watched):
    engine = build(servers, server_retries=5)
    engine.pool.replicas[0]._timeout_s = 0.5  # the failing one's alone: the other has the time that it needs
    servers[0].broken, servers[0].after = failure, 5
    watcher = Watcher()
    rollouts = engine.generate(requests(12), SAMPLING, watcher if watched else None, 4)
    assert texts(rollouts) == expected(12)
    assert [r.index for r in rollouts] == list(range(12))
    if watched:
        assert {i: tokens for i, tokens in watcher.seen.items()} == {i: e[0] for i, e in enumerate(expected(12))}
    engine.close()


def test_a_replica_that_comes_back_gets_the_parameters_before_it_generates(servers):
    engine = build(servers)
    servers[0].version = "default"  # as after a restart
    servers[0].files.clear()
    assert texts(engine.generate(requests(40), SAMPLING)) == expected(40)
    assert servers[0].files and servers[0].version == servers[1].version
    engine.close()


def test_what_the_watcher_saw_stays_where_another_machine_disagrees(servers):
    """The second server's tokens differ from position 10 on; the first one dies behind what was shown."""
    engine = build(servers)
    servers[0].broken, servers[0].after = "die", 14
    servers[1].shift = 1
    watcher = Watcher()
    (rollout,) = engine.generate(requests(1), SAMPLING, watcher, 12)
    assert servers[0].served == 1 and servers[1].served == 2  # once from the start, once behind what was shown
    assert rollout.tokens.tolist() == watcher.seen[0]
    assert rollout.tokens.tolist()[:12] == expected(1)[0][0][:12]
    assert rollout.tokens[12] == request_seed(1, 0, 12) % 400 + 50  # goes on with a seed of its own
    assert len(rollout) == 24
    assert engine.tokens_sampled > len(rollout)  # the part that both servers have sampled counts twice
    engine.close()


def test_stopped_answers_end_behind_their_segment(servers):
    engine = build(servers)
    rollouts = engine.generate(requests(20), SAMPLING, Watcher(set(range(0, 20, 2)), 8), 4)
    for index, ((tokens, reason), (whole, _)) in enumerate(zip(texts(rollouts), expected(20))):
        assert (tokens, reason) == ((whole[:8], "drift") if index % 2 == 0 else (whole, "length"))
    assert all(rollout.topk_ids.shape == (len(rollout), 2) for rollout in rollouts)
    assert engine.tokens_sampled >= sum(len(rollout) for rollout in rollouts)
    engine.close()


def test_with_no_server_left_the_error_names_the_addresses(servers):
    engine = build(servers)
    for server in servers:
        server.broken, server.after = "die", 3
    began = time.monotonic()
    with pytest.raises(RolloutError, match="rollout.vllm.server_retries: 2") as raised:
        engine.generate(requests(4), SAMPLING)
    assert all(server.url in str(raised.value) for server in servers)
    assert time.monotonic() - began > 1.4  # back-off of 0.5 s and 1 s
    with pytest.raises(RolloutError, match="no vLLM server took policy version 1"):
        for server in servers:
            server.broken = "500"
        engine.update_parameters(parameters, 1)
    with pytest.raises(RolloutError, match="call update_parameters first"):
        engine.generate(requests(4), SAMPLING)
    engine.close()


def test_servers_that_never_come_up_are_named():
    config = server_config(servers=["http://127.0.0.1:9"], server_timeout_s=0.3)
    with pytest.raises(RolloutError, match=r"server_timeout_s: 0.3.*http://127.0.0.1:9: no connection"):
        VllmServerEngine(config, {EOS}, 128)


def test_a_refused_request_is_not_retried(servers, monkeypatch):
    for server in servers:
        server.key = "secret"
    with pytest.raises(RolloutError, match="refused the API key"):
        build(servers, server_retries=0)
    monkeypatch.setenv("MEGATRON_OPD_VLLM_API_KEY", "secret")
    engine = build(servers)
    monkeypatch.delenv("MEGATRON_OPD_VLLM_API_KEY")
    assert len(engine.generate(requests(3), SAMPLING)) == 3
    for server in servers:
        server.key = "changed"
    with pytest.raises(RolloutError, match="refused the API key"):
        engine.generate(requests(3), SAMPLING)
    engine.close()


def test_gpu_transfers_are_refused_without_a_gpu():
    config = server_config(servers=["http://127.0.0.1:9"], transfer="nccl")
    with pytest.raises(ValueError, match="rollout.vllm.transfer: nccl needs GPUs"):
        VllmServerEngine(config, {EOS}, 128)


def test_buckets_are_copies_of_bounded_size():
    buffer = torch.zeros(4)  # a producer may reuse its memory

    def produce():
        for i in range(5):
            buffer.fill_(i)
            yield f"p{i}", buffer

    made = list(buckets(produce(), 32))
    assert [list(bucket) for bucket in made] == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [t[0].item() for bucket in made for t in bucket.values()] == [0, 1, 2, 3, 4]


def test_files_of_a_killed_trainer_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    living = TransferFiles(str(tmp_path), 1 << 20)
    living.write(iter([("a", torch.ones(2))]))
    killed = tmp_path / "megatron_opd-killed"
    killed.mkdir()
    (killed / "lock").touch()
    other = TransferFiles(str(tmp_path), 1 << 20)
    assert not killed.exists() and all(Path(path).exists() for path in living.paths)
    other.close()
    del living
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [[-1.0, -2.5], [-1.0, float("nan")]])
def test_engines_that_disagree_are_named(other):
    assert agreeing_probe([[-1.0, -2.0], [-1.0, -2.001]], ["a", "b"], 0.01).tolist() == [-1.0, -2.0]
    with pytest.raises(RolloutError, match="b differs from a"):
        agreeing_probe([[-1.0, -2.0], other], ["a", "b"], 0.01)


def test_seeds_differ_by_answer_and_by_run():
    seeds = {request_seed(seed, index) for seed in range(20) for index in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


def test_serve_refuses_an_open_port_without_a_key(monkeypatch):
    from megatron_opd.rollout.vllm.serve import build_parser, serve_command

    monkeypatch.delenv("MEGATRON_OPD_VLLM_API_KEY", raising=False)
    base = ["--model", "m", "--port", "1"]
    command, environment = serve_command(build_parser().parse_args(base), gpu=False)
    assert command[command.index("--host") + 1] == "127.0.0.1" and "VLLM_API_KEY" not in environment
    with pytest.raises(ValueError, match="--host 0.0.0.0 is open to the network"):
        serve_command(build_parser().parse_args([*base, "--host", "0.0.0.0"]), gpu=False)
    monkeypatch.setenv("MEGATRON_OPD_VLLM_API_KEY", "k")
    command, environment = serve_command(build_parser().parse_args([*base, "--host", "0.0.0.0"]), gpu=True)
    assert environment["VLLM_API_KEY"] == "k" and "k" not in command
    assert '{"backend": "nccl"}' in command
    with pytest.raises(ValueError, match="--transfer ipc needs GPUs"):
        serve_command(build_parser().parse_args([*base, "--transfer", "ipc"]), gpu=False)


def test_five_hundred_requests_at_once_are_answered_once_each(servers):
    """Half of them by a server that sends slowly: 16 tokens, and the rest once all others are through."""
    engine = build(servers, max_batch=250)
    servers[0].broken, servers[0].after = "stall", 16

    def open_when_the_other_is_done():
        while servers[1].served < 250 or servers[1].running:
            time.sleep(0.01)
        servers[0].broken = ""
        servers[0].gate.set()

    threading.Thread(target=open_when_the_other_is_done, daemon=True).start()
    rollouts = engine.generate(requests(500), SAMPLING)
    assert texts(rollouts) == expected(500)
    assert [r.index for r in rollouts] == list(range(500))
    assert servers[0].served + servers[1].served == 500
    engine.close()


@pytest.mark.parametrize("answer", WRONG)
def test_what_answers_in_another_form_is_a_broken_replica(servers, answer):
    engine = build(servers, server_retries=5)
    servers[0].broken = answer
    assert texts(engine.generate(requests(12), SAMPLING)) == expected(12)
    assert "reply in another form" in engine.pool.replicas[0].error
    engine.close()


def test_an_answer_without_end_is_cut_off(servers, monkeypatch):
    monkeypatch.setattr(client, "LARGEST_REPLY", 1 << 20)
    engine = build(servers, server_retries=5)
    servers[0].broken = "endless"
    assert texts(engine.generate(requests(12), SAMPLING)) == expected(12)
    assert "sends more than 1 MB at once" in engine.pool.replicas[0].error
    engine.close()
