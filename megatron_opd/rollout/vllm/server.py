"""vLLM on servers of their own, started by `python -m megatron_opd.rollout.vllm.serve`, by hand or by a Slurm script.

Rank 0 alone talks to them; what it receives is broadcast. Each response is one streamed request to the replica with the
least load. Where a replica dies, its responses start again on another one, with the same seed: the same tokens, up to
rounding that differs between machines. What the watcher has already seen stays as it is; should another machine
disagree with that, the response goes on behind it with a seed of its own.

Hand-over: `transfer: file` writes safetensors files of at most `rollout.bucket_mb` into a directory that every server
reads, and keeps those of the newest parameters until the next hand-over, so that a replica that was down gets them
before it generates again. `nccl` and `ipc` (GPUs) keep no copy: such a replica stays out until the next hand-over.
Versions carry a name of this run: what an earlier run left on a server never passes for ours.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config import ConfigError, RolloutConfig
from megatron_opd.parallel.collective import on_rank_0
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment, Watch
from megatron_opd.rollout.vllm.client import Pool, Replica, ReplicaError, backoff_s
from megatron_opd.rollout.vllm.common import (
    CONTROL_TIMEOUT,
    END_REASONS,
    RolloutError,
    agreeing_probe,
    check_requests,
    request_seed,
    sampling_arguments,
)
from megatron_opd.rollout.vllm.files import TransferFiles
from megatron_opd.rollout.vllm.responses import Response, due_segments, share_rollouts, share_segments
from megatron_opd.types import Rollout

logger = logging.getLogger(__name__)
POLL_S = 0.02  # how long newly finished segments may wait for others, to be scored together


class VllmServerEngine(RolloutEngine):
    """See the module's docstring. Construction is collective and waits up to `server_timeout_s` for all servers.

    `eos_ids` end a response and belong to it. `max_model_len` is the longest prompt plus response, unless
    `config.vllm.max_model_len` gives one; servers must be started with at least that.
    """

    def __init__(
        self,
        config: RolloutConfig,
        eos_ids: Iterable[int],
        max_model_len: int,
        precision: Literal["fp32", "bf16"] = "bf16",
    ) -> None:
        self.config = config
        self.tolerance = config.tolerance(precision)
        self.eos_ids = sorted(eos_ids)
        self.max_model_len = config.vllm.max_model_len or max_model_len
        self.distributed = dist.is_initialized()
        self.first = not self.distributed or dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if self.distributed else None
        self.transfer = config.vllm.transfer
        if self.transfer == "auto":
            self.transfer = "nccl" if torch.cuda.is_available() else "file"
        if self.transfer != "file" and not torch.cuda.is_available():
            raise ConfigError(f"rollout.vllm.transfer: {self.transfer} needs GPUs; without one use transfer: file")
        key = os.environ.get(config.vllm.api_key_env)
        self.pool = Pool(
            [Replica(url, key, config.vllm.server_timeout_s) for url in config.vllm.servers], config.max_batch
        )
        self._run_name = uuid.uuid4().hex[:12]
        self._files: TransferFiles | None = None
        self._native: Any = None
        self._on_first(self._wait_for_servers)

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        if self.policy_version < 0:
            raise RolloutError("no parameters were handed over to the servers; call update_parameters first")
        check_requests(requests, sampling, self.max_model_len)
        by_index = {request.index: request for request in requests}
        run: _Run | None = None
        if self.first:
            run = _Run(self, [Response(request, sampling.top_logprobs) for request in requests], sampling)
        try:
            if watch is None:
                self._on_first(lambda: run.finish() if run else None)
            else:
                while segments := self._next_segments(run, segment, by_index):
                    stopped = watch(segments)
                    if run:
                        run.stop(stopped)
        finally:
            if run:
                run.close()
        self.tokens_sampled = self._on_first(lambda: run.sampled if run else 0)
        return share_rollouts(run.responses if run else (), self.first, by_index, self.policy_version, self.group)

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        """Hands the parameters to every server. Raises RolloutError on every rank where no server took them."""
        self.policy_version = -1
        if self.transfer == "file":
            stream = named_parameters()
            if not self.first:
                for _ in stream:  # it is collective
                    pass
            self._on_first(lambda: self._write(stream))
            self._on_first(lambda: self._hand_over(version))
        else:
            self._send_native(named_parameters, version)
        self.policy_version = version

    def probe(self, tokens: list[int]) -> Tensor:
        body = {
            "token_ids": tokens,
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }

        def ask() -> Tensor:
            probes, names = [], []
            for replica in self.pool.live:
                try:
                    with _replies_of_vllm():
                        table = replica.call("POST", "/inference/v1/generate", body)["prompt_logprobs"]
                        entries = zip(table[1:], tokens[1:], strict=True)
                        probe = [float(entry[str(token)]["logprob"]) for entry, token in entries]
                except ReplicaError as error:
                    self.pool.mark_down(replica, error)
                    continue
                probes.append(probe)
                names.append(replica.url)
            if not probes:
                raise RolloutError(f"no vLLM server is left: {self.pool.describe()}")
            return agreeing_probe(probes, names, self.tolerance)

        return self._on_first(ask)

    def close(self) -> None:
        """Removes the transfer files. The servers go on; who started them ends them."""
        if self._files is not None:
            self._files.close()
            self._files = None
        if self._native is not None:
            self._native.close()
            self._native = None

    def tag(self, version: int) -> str:
        """The policy version as the servers know it; vLLM calls it the weight version."""
        return f"{self._run_name}:{version}"

    def restore(self, replica: Replica, version: int) -> None:
        """Makes a replica fit to generate with `version`; raises ReplicaError where it cannot be."""
        if replica.check() == self.tag(version):
            return
        if self._files is None:
            raise ReplicaError(f"missed the hand-over of version {version}; transfer: {self.transfer} keeps no copy")
        replica.load_files(self._files.paths, self.tag(version))
        logger.info("%s took policy version %d", replica.url, version)

    def _wait_for_servers(self) -> None:
        deadline = time.monotonic() + self.config.vllm.server_timeout_s
        attempt = 0
        while True:
            self.pool.restore_all(lambda replica: replica.call("GET", "/health"))
            if len(self.pool.live) == len(self.pool.replicas):
                return
            attempt += 1
            pause = min(backoff_s(attempt), 5.0)
            if time.monotonic() + pause > deadline:
                raise RolloutError(
                    "vLLM servers did not come up within rollout.vllm.server_timeout_s: "
                    f"{self.config.vllm.server_timeout_s}: " + self.pool.describe()
                )
            time.sleep(pause)

    def _write(self, named: Iterator[tuple[str, Tensor]]) -> None:
        try:
            if self._files is None:
                self._files = TransferFiles(self.config.vllm.transfer_dir or "/dev/shm", self.config.bucket_mb << 20)
            self._files.write(named)
        finally:
            for _ in named:  # where writing failed: the other ranks wait for this one in the stream's collectives
                pass

    def _hand_over(self, version: int) -> None:
        for attempt in range(self.config.vllm.server_retries + 1):
            if attempt:
                time.sleep(backoff_s(attempt))
            self.pool.restore_all(lambda replica: self.restore(replica, version))
            if self.pool.live:
                return
        raise RolloutError(f"no vLLM server took policy version {version}: {self.pool.describe()}")

    def _send_native(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        from megatron_opd.rollout.vllm.native import NativeTransfer

        if self._native is None:
            self._native = NativeTransfer(self.transfer, self.config.bucket_mb << 20, self.pool.replicas)
        live = self._on_first(lambda: self._prepare_native())
        try:
            self._native.send(named_parameters, live)
        except BaseException:
            self._native.close()
            self._native = None
            raise
        self._on_first(lambda: self._finish_native(version))

    def _prepare_native(self) -> list[str]:
        self.pool.restore_all(Replica.begin_update)
        if not self.pool.live:
            raise RolloutError(f"no vLLM server is left: {self.pool.describe()}")
        return [replica.url for replica in self.pool.live]

    def _finish_native(self, version: int) -> None:
        for replica in self.pool.live:
            replica.end_update(self.tag(version))

    def _next_segments(self, run: _Run | None, segment: int, by_index: dict[int, Request]) -> list[Segment]:
        """What `_Run.next_segments` returns on rank 0, on every rank."""
        ready: list[Segment] = []
        self._on_first(lambda: ready.extend(run.next_segments(segment)) if run else None)
        return share_segments(ready, self.first, by_index, self.group)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on rank 0 and returns its result on every rank; its errors are raised on every rank."""
        return on_rank_0(work, self.group, otherwise=RolloutError)


class _Run:
    """One call of `generate` on rank 0: threads fill the responses, the caller looks at them."""

    def __init__(self, engine: VllmServerEngine, responses: list[Response], sampling: Sampling):
        self.engine, self.responses, self.sampling = engine, responses, sampling
        self.version = engine.policy_version
        self.lock = threading.Lock()
        self.sampled = 0  # tokens that arrived, whatever became of them
        self.closed = threading.Event()
        workers = max(1, min(len(responses), len(engine.pool.replicas) * engine.config.max_batch))
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="rollout")
        self.futures: list[Future[None]] = [self.executor.submit(self._generate, response) for response in responses]

    def finish(self) -> None:
        """Waits for all responses; raises the first error."""
        left = set(self.futures)
        while left and not any(future.done() and future.exception() for future in self.futures):
            left = wait(left, timeout=1.0, return_when=FIRST_EXCEPTION).not_done
            self._tell()
        self._raise_errors()

    def _tell(self) -> None:
        if self.engine.on_progress is not None:
            ended = sum(response.end is not None for response in self.responses)
            self.engine.on_progress(ended, len(self.responses), self.sampled)

    def next_segments(self, segment: int) -> list[Segment]:
        """Waits for new segments; an empty list once the watcher has seen all."""
        while True:
            with self.lock:
                segments = due_segments(self.responses, segment)
                if segments or all(response.seen_end for response in self.responses):
                    return segments
            self._raise_errors()
            self._tell()
            self.closed.wait(POLL_S)

    def stop(self, indices: Iterable[int]) -> None:
        """Ends the responses with these indices behind their last segment."""
        stopped = set(indices)
        with self.lock:
            for response in self.responses:
                if response.request.index in stopped:
                    response.stop()

    def close(self) -> None:
        """Ends what is still running."""
        self.closed.set()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _raise_errors(self) -> None:
        for future in self.futures:
            if future.done() and not future.cancelled() and (error := future.exception()):
                self.closed.set()
                raise error

    def _generate(self, response: Response) -> None:
        """Brings one response to its end, on one replica after the other if need be."""
        pool, retries = self.engine.pool, self.engine.config.vllm.server_retries
        failures = 0
        failed: Counter[Replica] = Counter()
        while not self._done(response):
            replica = pool.acquire(lambda replica: self.engine.restore(replica, self.version), failed)
            if replica is not None:
                succeeded = False
                try:
                    self._stream(replica, response)
                    succeeded = True
                    continue
                except ReplicaError as error:
                    logger.warning("%s: %s; response %d goes elsewhere", replica.url, error, response.request.index)
                    pool.mark_down(replica, error)
                    failed[replica] += 1
                finally:
                    pool.release(replica, succeeded)
            failures += 1
            if failures > retries:
                left = "" if pool.live else "no vLLM server is left; "
                raise RolloutError(
                    f"response {response.request.index} failed {failures} times "
                    f"(rollout.vllm.server_retries: {retries}); " + left + pool.describe()
                )
            self.closed.wait(backoff_s(failures))

    def _done(self, response: Response) -> bool:
        return response.end is not None or self.closed.is_set()

    def _stream(self, replica: Replica, response: Response) -> None:
        """Streams the response from its beginning; tokens that a dead replica has left are compared."""
        pinned = response.pinned
        request = response.request
        seed = request_seed(self.sampling.seed, request.index, pinned)
        arguments = sampling_arguments(self.sampling, request, seed, self.engine.eos_ids)
        arguments["max_tokens"] -= pinned
        tokens = [*request.tokens, *response.tokens[:pinned]]
        body = {"token_ids": tokens, "sampling_params": arguments}
        position = pinned
        with closing(replica.stream(body, self.engine.tag(self.version))) as choices, _replies_of_vllm():
            for choice in choices:
                reason = choice["finish_reason"]
                if reason is not None and reason not in END_REASONS:
                    raise ReplicaError(f"ended a response with {reason!r}")
                with self.lock:
                    self.sampled += len(choice["token_ids"] or ())
                    if self._done(response):
                        return
                    for entry in choice["logprobs"]["content"] if choice["token_ids"] else ():
                        if not _put(response, position, entry):
                            response.pinned = response.shown
                            return
                        position += 1
                    if reason is not None:
                        response.truncate(position)
                        response.finish(END_REASONS[reason])


@contextmanager
def _replies_of_vllm() -> Iterator[None]:
    """What is JSON and yet no reply of vLLM's is a fault of the replica."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ReplicaError(f"a reply in another form than vLLM's: {error!r}") from error


def _put(response: Response, position: int, entry: dict[str, Any]) -> bool:
    """Puts a token at its position; False where the watcher has seen another one there."""
    token = entry["token_id"]
    if not isinstance(token, int) or not isinstance(entry["logprob"], float | int):
        raise ReplicaError(f"a reply in another form than vLLM's: {str(entry)[:200]}")
    if position < len(response.tokens):
        if response.tokens[position] == token:
            return True
        if position < response.shown:
            response.truncate(response.shown)
            return False
        response.truncate(position)
    top: Sequence[dict[str, Any]] = entry["top_logprobs"]
    response.append(token, entry["logprob"], [c["token_id"] for c in top], [c["logprob"] for c in top])
    return True
