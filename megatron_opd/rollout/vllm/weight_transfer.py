"""The vLLM side of the hand-over: loads parameters in place, inside vLLM's worker processes.

Importing this module registers the weight transfer engine "file" with vLLM (the built-in ones, "nccl" and "ipc", need
GPUs): the trainer writes safetensors files and names them in the update request. `vllm_serve` makes every worker
import it by naming `WorkerExtension` as the worker extension class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_opd.compat.vllm_cpu import forget_packed_experts, repack_tied_head


class ParameterLoad:
    """One hand-over into `model`, a vLLM model: `add` any number of times, then `finish`."""

    def __init__(self, model: torch.nn.Module, model_config: Any):
        self.model, self.model_config = model, model_config
        self.loaded: set[str] = set()
        forget_packed_experts(model)
        initialize_layerwise_reload(model)

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Loads full tensors under their Hugging Face names; each tensor-parallel rank keeps its part."""
        try:
            self.loaded |= self.model.load_weights(named)  # type: ignore[operator]  # every vLLM model has it
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)  # the model stays usable for the next hand-over
            raise

    def finish(self) -> None:
        """Puts the new values in place. Raises ValueError that names parameters which did not arrive."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)
        missing = sorted({name for name, _ in self.model.named_parameters()} - self.loaded)
        if missing:
            raise ValueError(f"the hand-over lacks {len(missing)} parameters of the engine's model: {missing[:8]}")


def load_parameters(worker: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Loads all parameters into the model of a vLLM worker of this process (for `collective_rpc`)."""
    with set_current_vllm_config(worker.vllm_config):
        load = ParameterLoad(worker.get_model(), worker.vllm_config.model_config)
        load.add(named)
        load.finish()


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One safetensors file, readable by every worker of the server."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Parameters through shared memory or a shared file system, one bucket per file."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    _load: ParameterLoad | None = None

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Opens a hand-over."""
        self._load = ParameterLoad(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one file. The base class would wait for an accelerator, which a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Loads the tensors of one file."""
        assert self._load is not None
        self._load.add(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        """Closes the hand-over; raises where a parameter is missing. Without an open one (a trainer clears up what
        another left) there is nothing to do."""
        load, self._load = self._load, None
        if load is not None:
            load.finish()

    def shutdown(self) -> None:
        """Nothing to disconnect."""


class WorkerExtension:
    """Adds nothing to vLLM's worker: naming it makes the worker's process import this module."""


WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)
