"""mbridge: the names, the configuration keys and how q/k/v and gate/up are merged.

Its own load and export are not used: they read Megatron-Core's global parallel state, while student and teacher live in
one process with layouts of their own. Its authors have deprecated it; nothing outside this module imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mbridge.core.llm_bridge import LLMBridge
from mbridge.core.parallel_states import ParallelStates
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

CLASSES: dict[str, type[LLMBridge]] = {
    "llama": LLaMABridge,
    "qwen2": Qwen2Bridge,
    "qwen3": Qwen3Bridge,
    "qwen3_moe": Qwen3MoEBridge,
}
_DIRECT, _ATTENTION, _MLP, _OTHER = TABLES = (
    "_DIRECT_MAPPING",  # parameters outside the layers
    "_ATTENTION_MAPPING",
    "_MLP_MAPPING",
    "_OTHER_MAPPING",  # of a layer, neither attention nor MLP
)


class Bridge:
    """mbridge's bridge of one model, with name tables of its own.

    mbridge keeps the tables on the class and lets a tied model change them for every later model of the family.
    """

    def __init__(
        self,
        model_type: str,
        hf_config: PretrainedConfig,
        dtype: torch.dtype,
        groups: ProcessGroupCollection,
        virtual_pipeline: int,
        names: Mapping[str, Sequence[str]],
        fields: Mapping[str, Any],
    ) -> None:
        """
        Args:
            model_type: one of CLASSES.
            names: Hugging Face names ({layer_number} in them) by Megatron-Core's parameter, where they are others than
                the class's; parameters of a layer without `decoder.layers.N.`.
            fields: of TransformerConfig; they win over what mbridge derives.
        """
        base = CLASSES[model_type]
        tables = {name: dict(getattr(base, name)) for name in TABLES}
        for parameter, tensors in names.items():
            table = _table_of(parameter)
            tables[table][parameter] = tensors[0] if table == _DIRECT else list(tensors)

        def build_base_config(self: Any, **kwargs: Any) -> TransformerConfig:
            return base._build_base_config(self, **{**kwargs, **fields})

        methods = {"_build_base_config": build_base_config, "_adjust_mapping_for_shared_weights": lambda self: None}
        kind = type(base.__name__, (base,), {**tables, **methods})
        self._bridge = kind(hf_config, dtype=dtype, parallel_states=_states(groups, virtual_pipeline))
        self.config: TransformerConfig = self._bridge.config

    def hf_names(self, name: str) -> list[str]:
        """Names of the tensors that make up one parameter. Raises KeyError where the family has no such parameter."""
        try:
            return self._bridge._weight_name_mapping_mcore_to_hf(name)
        except (NotImplementedError, IndexError) as error:
            raise KeyError(name) from error

    def to_megatron(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Merges tensors in the order of `hf_names`; whole ones, or one tensor rank's slice of each."""
        return self._bridge._weight_to_mcore_format(name, tensors)

    def to_hf(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The inverse of `to_megatron`."""
        return self._bridge._weight_to_hf_format(name, tensor)[1]


def _table_of(parameter: str) -> str:
    if parameter.startswith("self_attention."):
        return _ATTENTION
    if "mlp" in parameter.partition(".")[0]:
        return _MLP
    return _DIRECT if parameter.startswith(("embedding.", "decoder.", "output_layer.")) else _OTHER


def _states(groups: ProcessGroupCollection, virtual_pipeline: int) -> ParallelStates:
    states = ParallelStates(vpp_size=virtual_pipeline if virtual_pipeline > 1 else None)
    for short, field in (("tp", "tp"), ("pp", "pp"), ("cp", "cp"), ("ep", "ep"), ("etp", "expt_tp")):
        group = getattr(groups, field, None)
        if group is not None:
            setattr(states, f"{short}_size", group.size())
            setattr(states, f"{short}_rank", group.rank())
            setattr(states, f"{short}_group", group)
    return states
