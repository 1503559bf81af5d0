"""Names of Megatron-Core that it does not promise to keep, each behind a function of ours: layers, schedule, optimizer.

`compat/gpt_model.py` has those of its model class, `compat/dist_checkpointing.py` those of its checkpoints and
`compat/cpu_platform.py` what is patched where there is no GPU. tests/compat/ checks each in the installed version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

__all__ = ["P2PCommunicator"]

PLAIN_FORWARD = "_forward_impl"  # of Megatron-Core's own linear layers: (input, weight, bias, **) -> output
SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def plain_linears(chunk: torch.nn.Module) -> Iterator[None]:
    """Inside, Megatron-Core's own linear layers multiply plainly: their autograd functions are a third of a small
    step's calls. For passes without gradients; Transformer Engine's layers stay as they are."""
    layers = [module for module in chunk.modules() if hasattr(module, PLAIN_FORWARD)]
    before = [getattr(layer, PLAIN_FORWARD) for layer in layers]
    for layer in layers:
        setattr(layer, PLAIN_FORWARD, lambda input, weight, bias, **_: torch.nn.functional.linear(input, weight, bias))
    try:
        yield
    finally:
        for layer, implementation in zip(layers, before, strict=True):
            setattr(layer, PLAIN_FORWARD, implementation)


def set_sequence_parallel(chunk: torch.nn.Module, value: bool) -> None:
    """Megatron-Core's own function of this purpose remembers modules by id(), also those of models that are gone."""
    chunk.config.sequence_parallel = value  # type: ignore[union-attr]
    for module in chunk.modules():
        for name in SEQUENCE_PARALLEL:
            if hasattr(module, name):
                setattr(module, name, value)


def fuse_gradient_accumulation(module: torch.nn.Module) -> None:
    """One of Megatron-Core's own linear layers adds its gradient to `main_grad` inside the product (apex's kernel)."""
    if hasattr(module, "gradient_accumulation_fusion"):
        module.gradient_accumulation_fusion = True  # type: ignore[assignment]


class P2PWithKnownShapes(P2PCommunicator):
    """Pipeline communication that asks `known_shapes` where Megatron-Core exchanges shapes before every tensor."""

    def known_shapes(self, from_previous: bool, from_next: bool) -> tuple[list[int], list[int]]:
        """Shapes of what comes from the stage before and from the one behind; [0, 0, 0] where nothing comes."""
        raise NotImplementedError

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        return self.known_shapes(recv_prev, recv_next)


def base_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron-Core's optimizers inside a chained one (dense parameters, experts) that hold parameters here. Each has
    the torch optimizer that does the updates as its `optimizer`."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [one for one in chained if one.optimizer is not None]


@dataclass(frozen=True)
class Updated:
    """What an optimizer updates for one parameter of the model."""

    tensor: Tensor  # the parameter itself, its fp32 copy, or a flat range of that
    start: int | None  # where the flat range starts in the parameter; None: `tensor` has the parameter's shape


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether one of `base_optimizers` shares out parameters over data-parallel ranks, each with a flat range."""
    return isinstance(optimizer, DistributedOptimizer)


def updated_tensor(optimizer: MegatronOptimizer, parameter: Tensor) -> Updated | None:
    """What one of `base_optimizers` updates for `parameter`; None where another rank holds all of that.

    Without a distributed optimizer the result does not say whether this optimizer or another one holds it.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return Updated(getattr(parameter, "main_param", parameter), None)
    if parameter not in optimizer.model_param_group_index_map:
        return None
    group, number = optimizer.model_param_group_index_map[parameter]
    start = optimizer._get_model_param_range_map(parameter)["param"].start
    return Updated(optimizer.optimizer.param_groups[group]["params"][number], start)


def restart_scheduler(scheduler: OptimizerParamScheduler, state: dict[str, Any]) -> None:
    """Loads a scheduler's state; it counts on from where it stands, so that goes to 0 first."""
    scheduler.num_steps = 0
    scheduler.load_state_dict(state)
