"""vLLM inside the training ranks.

Every `rollout.vllm.tensor` consecutive ranks share one engine (vLLM's external launcher: each of them runs the
scheduler on the same requests and holds its part of the model); the engines split the requests. vLLM builds its process
groups next to Megatron's on the default group that the trainer has initialised; neither touches the other's.

The engine starts with random parameters, since `update_parameters` replaces all of them before anything is generated.
Memory: on GPUs `rollout.vllm.gpu_memory_utilization` of the device, given back while asleep; on the CPU a key/value
cache of `rollout.vllm.cpu_cache_mb`, and sleeping changes nothing, since there is no memory to hand over.
"""

from __future__ import annotations

import os
import random
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.compat import vllm
from megatron_opd.compat.vllm_logprobs import forget_logprobs
from megatron_opd.config import ConfigError, RolloutConfig
from megatron_opd.parallel.collective import all_gather, everywhere, from_rank_0
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Watch
from megatron_opd.rollout.vllm.common import (
    CONTROL_TIMEOUT,
    END_REASONS,
    RolloutError,
    agreeing_probe,
    check_requests,
    refusal,
    request_seed,
    sampling_arguments,
)
from megatron_opd.rollout.vllm.responses import Response, due_segments, share_rollouts, share_segments
from megatron_opd.types import Rollout

_T = TypeVar("_T")


class VllmColocateEngine(RolloutEngine):
    """See the module's docstring. Construction is collective and takes 10 to 60 s.

    `model_dir` needs the model's config alone. `eos_ids` end a response and belong to it. `max_model_len` is the
    longest prompt plus response, unless `config.vllm.max_model_len` gives one. Raises ConfigError where
    `config.vllm.tensor` does not divide the number of ranks, or where vLLM refuses what the config asks for.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_dir: str | Path,
        eos_ids: Iterable[int],
        max_model_len: int,
        precision: Literal["fp32", "bf16"] = "bf16",
    ) -> None:
        self.config = config
        self.tolerance = config.tolerance(precision)
        self.eos_ids = sorted(eos_ids)
        self.max_model_len = config.vllm.max_model_len or max_model_len
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size % config.vllm.tensor:
            raise ConfigError(
                f"rollout.vllm.tensor: {config.vllm.tensor} must divide the number of training ranks, {self.world_size}"
            )
        self.engines = self.world_size // config.vllm.tensor
        self.group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self._asleep = False
        self._sampled = 0  # tokens of the running `generate`, by this rank's engine
        with _process_state_kept():
            self._llm = self._start(str(model_dir), precision)

    def generate(
        self, requests: list[Request], sampling: Sampling, watch: Watch | None = None, segment: int = 128
    ) -> list[Rollout]:
        if self.policy_version < 0:
            raise RolloutError("no parameters were handed over to vLLM; call update_parameters first")
        check_requests(requests, sampling, self.max_model_len)
        by_index = {request.index: request for request in requests}
        responses = {str(r.index): Response(r, sampling.top_logprobs) for r in self._share(requests)}
        self._sampled = 0
        self._everywhere(lambda: self._submit(responses, sampling))
        if watch is None:
            self._everywhere(lambda: self._run(responses, None))
        else:
            self._watched(responses, by_index, watch, segment)
        self.tokens_sampled = sum(self._gather(self._sampled))
        # Engines hold consecutive requests: their responses, one engine's behind the other's, are in order.
        return share_rollouts(responses.values(), self._owner, by_index, self.policy_version, self.group)

    def update_parameters(self, named_parameters: Callable[[], Iterator[tuple[str, Tensor]]], version: int) -> None:
        """Takes the parameters in place, one layer in flight at a time. A tensor must stay as it is until the producer
        has gone on to the next layer. Raises RolloutError on every rank where one rank fails."""
        from megatron_opd.rollout.vllm.weight_transfer import load_parameters

        def load() -> None:
            stream = named_parameters()
            try:  # chain, because vLLM's loaders close a generator that they are given when they fail
                self._llm.collective_rpc(load_parameters, args=(chain(stream),))
            finally:
                for _ in stream:  # where loading failed: the other ranks wait for this one in its collectives
                    pass

        self.policy_version = -1
        self._everywhere(load)
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache after a hand-over: requests were still running")
        self.policy_version = version

    def probe(self, tokens: list[int]) -> Tensor:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)

        def run() -> list[float]:
            self._add("probe", tokens, params)
            while self._llm.has_unfinished_requests():
                for output in self._llm.step():
                    table = output.prompt_logprobs
            return [candidates[token].logprob for candidates, token in zip(table[1:], tokens[1:], strict=True)]

        probes = self._gather(self._everywhere(run))
        names = [f"engine of rank {i * self.config.vllm.tensor}" for i in range(self.engines)]
        return agreeing_probe(probes, names, self.tolerance)

    def sleep(self) -> None:
        if torch.cuda.is_available() and not self._asleep:
            self._asleep = True
            self._llm.sleep(level=1)  # level 2 would drop the parameters: wrong where no hand-over follows the wake

    def wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Frees the engine and vLLM's process groups; the trainer's stay."""
        if self._llm is None:
            return
        vllm.shut_down(self._llm)
        self._llm = None
        vllm.destroy_process_groups()

    def _start(self, model_dir: str, precision: str) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop runs in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        config, gpu = self.config, torch.cuda.is_available()
        arguments: dict[str, Any] = dict(
            model=model_dir,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
            tensor_parallel_size=config.vllm.tensor,
            distributed_executor_backend="external_launcher",
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_batch,
            logprobs_mode="raw_logprobs",
            max_logprobs=-1,
            enforce_eager=config.vllm.enforce_eager or not gpu,
            disable_log_stats=True,
        )
        if gpu:
            arguments |= dict(gpu_memory_utilization=config.vllm.gpu_memory_utilization, enable_sleep_mode=True)
        else:
            # vLLM 0.32 winds a seeded generator back where it splits a prompt, which a CPU's generator cannot
            arguments |= dict(kv_cache_memory_bytes=config.vllm.cpu_cache_mb << 20, enable_chunked_prefill=False)
        # A name of this run's own, for the CPU build's shared memory.
        name = nullcontext() if gpu else vllm.named_launch(from_rank_0(uuid.uuid4().hex, self.group))
        try:
            with name:
                llm = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except ValueError as error:
            raise ConfigError(f"rollout: vLLM refuses {model_dir} with these keys: {refusal(error)}") from error
        vllm.keep_process_groups(llm)
        return llm

    @property
    def _owner(self) -> bool:
        """Whether this rank speaks for its engine; the engine's other ranks hold the same responses."""
        return self.rank % self.config.vllm.tensor == 0

    def _share(self, requests: Sequence[Request]) -> Sequence[Request]:
        """This engine's part: consecutive requests, so that a prompt's responses share its prefix in the cache."""
        engine, count = self.rank // self.config.vllm.tensor, len(requests)
        return requests[count * engine // self.engines : count * (engine + 1) // self.engines]

    def _add(self, name: str, tokens: list[int], params: Any) -> None:
        self._llm.add_request(name, vllm.render_tokens(self._llm, tokens), params)

    def _submit(self, responses: dict[str, Response], sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for name, response in responses.items():
            seed = request_seed(sampling.seed, response.request.index)
            params = SamplingParams(
                **sampling_arguments(sampling, response.request, seed, self.eos_ids),
                flat_logprobs=True,
                output_kind=RequestOutputKind.DELTA,
            )
            self._add(name, response.request.tokens, params)

    def _step(self, responses: dict[str, Response]) -> None:
        for output in self._llm.step():
            response, part = responses[output.request_id], output.outputs[0]
            table = part.logprobs
            self._sampled += len(part.token_ids)
            for i, token in enumerate(part.token_ids):
                start, stop = table.start_indices[i], table.end_indices[i]  # the sampled token, then the candidates
                ids, logprobs = table.token_ids[start + 1 : stop], table.logprobs[start + 1 : stop]
                response.append(token, table.logprobs[start], ids, logprobs)
            forget_logprobs(self._llm, output.request_id)
            if part.finish_reason is not None:
                if part.finish_reason not in END_REASONS:
                    raise RolloutError(f"vLLM ended response {output.request_id} with {part.finish_reason!r}")
                response.finish(END_REASONS[part.finish_reason])

    def _run(self, responses: dict[str, Response], segment: int | None) -> None:
        """Steps the engine until all is generated; with `segment`, until the responses in generation have one more
        segment each. Responses that started a few steps later (prompts are computed in turns) may catch up."""
        steps = 0
        while self._llm.has_unfinished_requests():
            if segment is not None and steps >= segment:
                grace = segment // 8 - (steps - segment)
                started = [r for r in responses.values() if r.tokens and r.end is None]
                if not any(0 < r.missing(segment) <= grace for r in started):
                    return
            self._step(responses)
            steps += 1
            if self.on_progress is not None:
                self.on_progress(sum(r.end is not None for r in responses.values()), len(responses), self._sampled)

    def _watched(
        self, responses: dict[str, Response], by_index: dict[int, Request], watch: Watch, segment: int
    ) -> None:
        while True:
            self._everywhere(lambda: self._run(responses, segment))
            segments = share_segments(due_segments(responses.values(), segment), self._owner, by_index, self.group)
            unseen = self._gather(any(not response.seen_end for response in responses.values()))
            if segments:
                # In the same order on all ranks of an engine:
                stopped = sorted({str(index) for index in watch(segments)} & responses.keys())
                self._llm.abort_request([name for name in stopped if responses[name].end is None])
                for name in stopped:
                    responses[name].stop()
            if not any(unseen):
                return

    def _everywhere(self, work: Callable[[], _T]) -> _T:
        """Runs `work` on this rank; where a rank fails, all raise, so that none waits in a collective for it."""

        def explained() -> _T:
            try:
                return work()
            except Exception:
                raise RolloutError(f"vLLM on rank {self.rank} failed:\n{traceback.format_exc()}") from None

        return everywhere(explained, self.group)

    def _gather(self, value: _T) -> list[_T]:
        """One value per engine, from its first rank; the other ranks of an engine hold the same."""
        values: list[Any] = all_gather(value if self._owner else None, self.group)
        return values[:: self.config.vllm.tensor]


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Starting vLLM seeds the global generators and, on the CPU, changes LOCAL_WORLD_SIZE, LD_PRELOAD and
    torch.set_num_threads; the trainer's go on as they were."""
    names = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "NUMEXPR_MAX_THREADS")
    environment = {name: os.environ.get(name) for name in names}
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
