"""Whole runs on pretended GPUs, for `run_distributed(..., start="spawn")`: every process patches torch first."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any

from tests.pretended_gpu.device import Pretended
from tests.pretended_gpu.machine import pretended_gpus
from tests.tiny_run import Case, Outcome, run_cases


class RunFailed(BaseException):
    """Ends the process, and with it the other ranks, which wait in a collective."""


def run_on_pretended_gpus(rank: int, world: int, folder: Path, cases: list[Case]) -> list[Outcome]:
    """`tests.tiny_run.run_cases` where every rank has a GPU to itself; every hand-over exports all parameters.

    Raises RunFailed for the first run that fails.
    """
    with pretended_gpus():
        prepare_megatron()
        from megatron_opd.rollout.megatron.engine import MegatronEngine
        from megatron_opd.training import loop

        update, train = MegatronEngine.update_parameters, loop.train

        def update_from_stream(self: Any, named_parameters: Any, version: int) -> None:
            for name, tensor in named_parameters():
                assert isinstance(tensor, Pretended), f"{name} is not on the GPU"
            self.probe([1, 2, 3])
            update(self, named_parameters, version)

        def train_or_end(config: Any) -> None:
            try:
                train(config)
            except Exception as error:
                raise RunFailed(f"{Path(config.run_dir).name}:\n{traceback.format_exc()}") from error

        MegatronEngine.update_parameters, loop.train = update_from_stream, train_or_end
        return run_cases(rank, world, folder, cases)


def prepare_megatron() -> None:
    """Megatron-Core's router asks for this name, which is defined with Transformer Engine alone."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
