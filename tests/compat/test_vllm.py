"""Names that compat/vllm.py uses, in the installed vLLM. tests/rollout/vllm/ runs engines with them."""

from __future__ import annotations

import importlib.util
import inspect
import json

import pytest

from megatron_opd.compat import vllm as compat

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def test_update_info_becomes_json():
    info = {"names": ["a.weight"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
    assert json.loads(json.dumps(compat.as_json(info))) == info
    pickled = compat.as_json({**info, "ipc_handles": [{"GPU-1": (1, b"handle")}]})
    assert "ipc_handles_pickled" in json.loads(json.dumps(pickled)), "handles travel pickled"


def test_a_launch_gets_a_name_of_its_own():
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    original = ExecutorWithExternalLauncher._distributed_args
    executor = object.__new__(ExecutorWithExternalLauncher)

    def seen(monkeypatched: pytest.MonkeyPatch) -> tuple:
        monkeypatched.setenv("RANK", "3")
        monkeypatched.setenv("LOCAL_RANK", "1")
        return executor._distributed_args()

    with pytest.MonkeyPatch.context() as patch:
        plain = seen(patch)
        with compat.named_launch("mine"):
            named = seen(patch)
    assert named == (f"{plain[0]}:mine", *plain[1:]) and plain[1:] == (3, 1)
    assert ExecutorWithExternalLauncher._distributed_args is original


def test_an_engine_in_this_process_has_what_is_taken_from_it():
    from vllm.v1.engine import core_client, llm_engine

    client = inspect.getsource(core_client.InprocClient)
    assert "self._finalizer = weakref.finalize(self, self.engine_core.shutdown" in client
    assert "renderer" in inspect.getsource(llm_engine.LLMEngine)
    from vllm.v1.engine.core import EngineCore

    core = inspect.getsource(EngineCore)
    assert "self.model_executor" in core and "self.scheduler" in core
    from vllm.distributed import parallel_state

    assert hasattr(parallel_state, "_WORLD") and callable(parallel_state.destroy_model_parallel)
    assert callable(parallel_state.GroupCoordinator.destroy)


def test_the_server_s_entry_takes_its_arguments_from_the_command_line():
    from vllm.entrypoints.launchers.api_server.entry import main

    required = [p for p in inspect.signature(main).parameters.values() if p.default is p.empty]
    assert not [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
