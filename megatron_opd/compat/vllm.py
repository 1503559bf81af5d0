"""Names of vLLM that it does not promise to keep, each behind a function of ours. Needs vLLM only when one is called.

`compat/vllm_cpu.py` has what concerns its CPU build alone. tests/compat/test_vllm.py checks each in the installed one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.inputs.engine import EngineInput
    from vllm.v1.engine.core_client import InprocClient


def as_json(update_info: Any) -> Any:
    """A weight transfer's update info in the form that vLLM's servers take."""
    from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

    return _json_safe_update_payload(update_info)


def keep_process_groups(engine: LLMEngine) -> None:
    """An LLMEngine of this process must not end the default process group with itself: it is the trainer's."""
    _client(engine)._finalizer.detach()


def shut_down(engine: LLMEngine) -> None:
    """Ends an LLMEngine of this process that `keep_process_groups` was called on, and its executor."""
    core = _client(engine).engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()


def _client(engine: LLMEngine) -> InprocClient:
    return engine.engine_core  # type: ignore[return-value]  # VLLM_ENABLE_V1_MULTIPROCESSING is 0


def destroy_process_groups() -> None:
    """Ends vLLM's own process groups, once no engine is left; the default one stays."""
    from vllm.distributed import parallel_state

    gc.unfreeze()  # vLLM freezes what exists when an engine has started
    gc.collect()
    parallel_state.destroy_model_parallel()
    parallel_state.get_world_group().destroy()
    parallel_state._WORLD = None


@contextmanager
def named_launch(name: str) -> Iterator[None]:
    """Engines started inside tell their launch apart by `name`.

    vLLM's CPU all-reduce names its shared memory after the address that the launcher gave: "env://" for every job on
    the machine. Two jobs would add up each other's tensors.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    original = ExecutorWithExternalLauncher._distributed_args

    def distributed_args(executor: Any) -> tuple[str, int, int]:
        method, rank, local_rank = original(executor)
        return f"{method}:{name}", rank, local_rank

    ExecutorWithExternalLauncher._distributed_args = distributed_args  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExecutorWithExternalLauncher._distributed_args = original  # type: ignore[method-assign]


def render_tokens(engine: LLMEngine, tokens: list[int]) -> EngineInput:
    """A prompt of token ids as LLMEngine.add_request takes it."""
    (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": tokens}])
    return prompt


def serve() -> None:
    """The `vllm serve` command with the arguments of this process; the `vllm` command itself lacks under vllm-cpu."""
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
