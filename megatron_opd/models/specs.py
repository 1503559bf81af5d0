"""Layer specs: Transformer Engine's on GPUs, Megatron-Core's own with packed attention everywhere else."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.compat.gpt_model import decoder_block_spec
from megatron_opd.compat.transformer_engine import import_transformer_engine
from megatron_opd.compat.versions import VersionError
from megatron_opd.config import ConfigError, ModelConfig
from megatron_opd.models.fp8 import check_fp8
from megatron_opd.models.packed import PackedAttention, PackedRow


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron-Core's form; its gradient is summed over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def use_transformer_engine(name: str, model: ModelConfig, cpu: bool) -> bool:
    """Which implementation a model gets.

    Raises:
        ConfigError: what the config asks for cannot run here, with the reason. Nothing falls back in silence.
    """
    if cpu:
        if model.fp8:
            raise ConfigError(f"{name}.fp8: {model.fp8} needs a GPU with FP8 and Transformer Engine; set fp8: null")
        if model.implementation == "transformer_engine":
            raise ConfigError(f"{name}.implementation: transformer_engine needs a GPU; set local or auto")
        return False
    if model.implementation == "local" or (model.implementation == "auto" and model.precision == "fp32"):
        return False  # in fp32 Transformer Engine's attention is unfused: O(tokens^2) of memory
    try:
        import_transformer_engine()
    except VersionError as error:
        raise ConfigError(
            f"{name}.implementation: {model.implementation} needs Transformer Engine: {error}; or set "
            f"{name}.implementation: local"
        ) from error
    check_fp8(name, model, torch.cuda.get_device_capability(), torch.version.cuda)
    return True


def refuse_foreign_apex() -> None:
    """PyPI's package `apex` is not NVIDIA's; Megatron-Core would import it by mistake.

    Raises:
        RuntimeError: it is installed.
    """
    if importlib.util.find_spec("apex") is None:
        return
    if importlib.util.find_spec("apex.optimizers") or importlib.util.find_spec("apex.multi_tensor_apply"):
        return
    try:
        version = distribution("apex").version
    except PackageNotFoundError:
        version = "unknown version"
    raise RuntimeError(
        f"the installed package apex ({version}) is not NVIDIA's apex but another project of that name on PyPI; "
        "pip uninstall apex (NVIDIA's is optional and built from its source)"
    )


def block_spec(
    config: TransformerConfig, transformer_engine: bool, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers that one pipeline stage (and virtual stage) builds."""
    if transformer_engine:
        block = decoder_block_spec(config, True, vp_stage, pp_rank)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = _with_cache(attention.core_attention)
        return block
    block = decoder_block_spec(config, False, vp_stage, pp_rank)
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block


def _with_cache(core: type | ModuleSpec) -> type:
    """Transformer Engine's attention core for whole rows, ours for rows with a key/value cache."""
    base = core.module if isinstance(core, ModuleSpec) else core

    class CoreAttention(base):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            config = kwargs.get("config") or args[0]
            number = kwargs.get("layer_number") or args[1]
            scale = kwargs.get("softmax_scale")
            # Not a submodule: it has no parameters, and checkpoints must not know it.
            self.__dict__["cached"] = PackedAttention(config, number, None, "self", softmax_scale=scale)

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            packed_seq_params: PackedSeqParams | None = None,
            **kwargs: Any,
        ) -> Tensor:
            if isinstance(packed_seq_params, PackedRow) and packed_seq_params.qkv_format == "sbhd":
                return self.__dict__["cached"](query, key, value, packed_seq_params=packed_seq_params)
            return super().forward(
                query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )

    return CoreAttention
