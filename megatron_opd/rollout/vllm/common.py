"""What both vLLM modes share; imports torch alone, so that a trainer can talk to servers without vLLM installed.

Log-probs come from vLLM's raw log-probs: temperature 1.0, full vocabulary, before top-p and top-k. vLLM leaves the
order of equal log-probs open, so `EXTRA_CANDIDATES` more than K are asked for and `responses.py` sorts them, ties to
the lowest id.
More equal log-probs than that at rank K cannot be told apart: which of them are returned is then vLLM's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megatron_opd.rollout.base import Request, RolloutError, Sampling
from megatron_opd.types import END_EOS, END_LENGTH

EXTRA_CANDIDATES = 4
CONTROL_TIMEOUT = timedelta(days=1)  # of groups in which ranks wait for a whole generation; the guard bounds steps
END_REASONS = {"stop": END_EOS, "length": END_LENGTH}


def refusal(error: ValueError) -> str:
    """What vLLM says against its arguments, without the frame that pydantic puts around it."""
    lines = [line for line in str(error).splitlines() if "validation error" not in line and "pydantic.dev" not in line]
    return " ".join(" ".join(lines).split("[type=")[0].split())


def request_seed(seed: int, index: int, position: int = 0) -> int:
    """The sampler's seed of one response: the same on every layout, engine and order of completion."""
    digest = hashlib.blake2b(f"{seed}:{index}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch generators take a signed 64-bit seed


def sampling_arguments(sampling: Sampling, request: Request, seed: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one request; as JSON, the body of a generate request.

    EOS ids are stop tokens, which vLLM keeps in the response; `ignore_eos` keeps it from adding its own.
    """
    return {
        "max_tokens": sampling.max_tokens - request.generated,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "logprobs": sampling.top_logprobs + EXTRA_CANDIDATES if sampling.top_logprobs else 0,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
        "detokenize": False,
    }


def check_requests(requests: Sequence[Request], sampling: Sampling, max_model_len: int) -> None:
    """Raises ValueError where a request cannot reach `sampling.max_tokens`, or where an index appears twice."""
    for request in requests:
        length = len(request.prompt.tokens)
        if not length:
            raise ValueError(f"prompt {request.prompt.uid} is empty")
        if length + sampling.max_tokens > max_model_len:
            raise ValueError(
                f"prompt {request.prompt.uid} has {length} tokens; with {sampling.max_tokens} to generate that is more "
                f"than rollout.vllm.max_model_len: {max_model_len}"
            )
    if len({request.index for request in requests}) != len(requests):
        raise ValueError("two requests have the same index; an index names one response of the batch")


def buckets(named: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Groups (name, tensor) pairs, copied to the CPU, into dictionaries of at most `limit` bytes (one tensor at least).

    The copy lets the producer reuse its buffers.
    """
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


def agreeing_probe(probes: list[list[float]], names: Sequence[str], tolerance: float) -> Tensor:
    """The first engine's probe [T-1] float32; raises RolloutError where another differs by more than `tolerance`."""
    values = torch.tensor(probes, dtype=torch.float32)
    gaps = (values - values[0]).abs().amax(dim=1)
    worst = int(gaps.argmax())
    if not gaps[worst] <= tolerance:  # NaN is not
        raise RolloutError(
            f"engines hold different parameters: on the probe prompt, {names[worst]} differs from {names[0]} by "
            f"{gaps[worst]:.4f} nats, more than rollout.sync_tolerance: {tolerance}"
        )
    return values[0]
