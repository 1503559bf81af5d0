"""What a Hugging Face directory says about a model, in Megatron-Core's terms: the only importer of mbridge.

mbridge knows the names, the configuration keys and how q/k/v and gate/up are merged. Its own load and export are not
used: they read Megatron-Core's global parallel state, while student and teacher live in one process with layouts of
their own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from mbridge.core.parallel_states import ParallelStates
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opd.weights.hf_files import ModelFileError

FAMILIES: dict[str, type] = {
    "llama": LLaMABridge,
    "qwen2": Qwen2Bridge,
    "qwen3": Qwen3Bridge,
    "qwen3_moe": Qwen3MoEBridge,
}
_MAPPINGS = ("_DIRECT_MAPPING", "_ATTENTION_MAPPING", "_MLP_MAPPING", "_OTHER_MAPPING")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the sequence length
_LAYER = "model.layers.{layer_number}."


class ModelBridge:
    """One model's configuration and names in both worlds.

    Attributes:
        hf_config: the Hugging Face configuration.
        config: Megatron-Core's TransformerConfig with this layout's parallel sizes.
        vocab_size: tokens of the Hugging Face model, without padding.
        tied: whether the output layer shares the embedding's parameters.
        rope_frequencies: [rotary dimensions / 2] float32, scaling included; see `apply_rope`.
    """

    def __init__(
        self, hf_config: PretrainedConfig, dtype: torch.dtype, states: ParallelStates, overrides: dict[str, Any]
    ) -> None:
        self.hf_config = hf_config
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self.vocab_size = int(hf_config.vocab_size)
        self.rope_frequencies, attention_factor = _rope(hf_config)
        self._mbridge = _instance(hf_config, dtype, states, overrides)
        self.config: TransformerConfig = self._mbridge.config
        if attention_factor != 1.0:
            # transformers scales cos and sin, hence q and k, by the factor; Megatron-Core's rope has no such place
            self.config.softmax_scale = attention_factor**2 / math.sqrt(self.config.kv_channels)

    @property
    def gpt_args(self) -> dict[str, Any]:
        """Keyword arguments of GPTModel that follow from the Hugging Face configuration; `vocab_size` is unpadded."""
        parameters = _rope_parameters(self.hf_config)
        return {
            "vocab_size": self.vocab_size,
            "max_sequence_length": self.hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": parameters["rope_theta"],
            "rotary_percent": parameters.get("partial_rotary_factor", 1.0),
            "share_embeddings_and_output_weights": self.tied,
        }

    def apply_rope(self, chunks: list[torch.nn.Module]) -> None:
        """Gives freshly built GPTModels the exact frequencies of transformers (llama3, yarn and linear scaling)."""
        for chunk in chunks:
            rotary: Any = chunk.rotary_pos_emb
            rotary.inv_freq = self.rope_frequencies.to(rotary.inv_freq.device)

    def hf_names(self, name: str) -> list[str]:
        """Hugging Face names of the tensors that make up one Megatron-Core parameter.

        `name` carries global numbers: `decoder.layers.7.mlp.experts.linear_fc1.weight3` is layer 7, expert 3.
        Raises ModelFileError where the family has no such parameter.
        """
        try:
            return self._mbridge._weight_name_mapping_mcore_to_hf(name)
        except (NotImplementedError, IndexError) as error:
            family = self.hf_config.model_type
            raise ModelFileError(f"{family} models have no parameter {name} in Hugging Face format") from error

    def to_megatron(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Merges one tensor-parallel rank's slices of `hf_names(name)` into its Megatron-Core parameter."""
        return self._mbridge._weight_to_mcore_format(name, tensors)

    def to_hf(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The inverse of `to_megatron`, on a whole parameter or on one rank's slice; in the order of `hf_names`."""
        return self._mbridge._weight_to_hf_format(name, tensor)[1]


def load_bridge(
    hf_dir: str | Path,
    dtype: torch.dtype,
    groups: ProcessGroupCollection,
    virtual_pipeline: int = 1,
    overrides: dict[str, Any] | None = None,
) -> ModelBridge:
    """Reads `config.json` of a Hugging Face or converted directory; no model is built and no tensor is read.

    `overrides` are TransformerConfig fields that win over what mbridge derives. Raises ModelFileError for a missing or
    unreadable config, an architecture or a variant of it that would not compute what transformers computes.
    """
    hf_config = read_hf_config(hf_dir)
    states = ParallelStates(vpp_size=virtual_pipeline if virtual_pipeline > 1 else None)
    for short, field in (("tp", "tp"), ("pp", "pp"), ("cp", "cp"), ("ep", "ep"), ("etp", "expt_tp")):
        group = getattr(groups, field, None)
        if group is not None:
            setattr(states, f"{short}_size", group.size())
            setattr(states, f"{short}_rank", group.rank())
            setattr(states, f"{short}_group", group)
    return ModelBridge(hf_config, dtype, states, overrides or {})


def read_hf_config(hf_dir: str | Path) -> PretrainedConfig:
    """The configuration of a supported model; never runs code of the directory (trust_remote_code stays off).

    Raises ModelFileError as `load_bridge` does.
    """
    path = Path(hf_dir, "config.json")
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}; a model directory needs a config.json") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from error
    family = raw.get("model_type")
    if family not in FAMILIES:
        name = "/".join(raw.get("architectures") or []) or "no architecture named"
        raise ModelFileError(
            f"{path}: unknown architecture {name} (model_type {family!r}); supported model types: {', '.join(FAMILIES)}"
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ModelFileError(f"{path}: quantised checkpoint (quant_method {method!r}); use the unquantised one")
    try:
        hf_config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its validators raise
        raise ModelFileError(f"{path}: {error}") from error
    _refuse_variants(path, hf_config)
    if getattr(hf_config, "head_dim", None) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    return hf_config


def _refuse_variants(path: Path, hf_config: PretrainedConfig) -> None:
    """Options of the supported families that Megatron-Core would silently leave out."""
    unsupported = {
        "hidden_act": (hf_config.hidden_act, "silu"),
        "use_sliding_window": (getattr(hf_config, "use_sliding_window", False) or False, False),
        "attention_bias": (getattr(hf_config, "attention_bias", False) or False, False),  # has a bias at o_proj too
        "mlp_bias": (getattr(hf_config, "mlp_bias", False) or False, False),
        "mlp_only_layers": (getattr(hf_config, "mlp_only_layers", None) or [], []),
        "decoder_sparse_step": (getattr(hf_config, "decoder_sparse_step", 1), 1),
    }
    for key, (value, wanted) in unsupported.items():
        if value != wanted:
            family = hf_config.model_type
            raise ModelFileError(f"{path}: {key}: {value!r} is not supported for {family}, only {wanted!r}")


def _instance(
    hf_config: PretrainedConfig, dtype: torch.dtype, states: ParallelStates, overrides: dict[str, Any]
) -> Any:
    """mbridge's bridge for this family, with name tables of its own.

    mbridge keeps the tables on the class and lets a tied model change them for every later model of the family.
    """
    base: Any = FAMILIES[hf_config.model_type]
    tables = {name: dict(getattr(base, name)) for name in _MAPPINGS}
    # Transformer Engine fuses these norms into the linear layer behind them; the local layers keep them apart.
    tables["_OTHER_MAPPING"]["input_layernorm.weight"] = [_LAYER + "input_layernorm.weight"]
    tables["_MLP_MAPPING"]["pre_mlp_layernorm.weight"] = [_LAYER + "post_attention_layernorm.weight"]
    if getattr(hf_config, "tie_word_embeddings", False):
        tables["_DIRECT_MAPPING"]["output_layer.weight"] = "model.embed_tokens.weight"

    fixed: dict[str, Any] = {"hidden_dropout": 0.0}
    if hf_config.model_type == "qwen3_moe":
        # without renormalisation the gates are the softmax over all experts, so it comes before the choice
        fixed["moe_router_pre_softmax"] = not hf_config.norm_topk_prob

    def build_base_config(self: Any, **kwargs: Any) -> TransformerConfig:
        return base._build_base_config(self, **{**kwargs, **fixed, **overrides})

    methods = {"_build_base_config": build_base_config, "_adjust_mapping_for_shared_weights": lambda self: None}
    return type(base.__name__, (base,), {**tables, **methods})(hf_config, dtype=dtype, parallel_states=states)


def _rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """transformers 5 keeps everything about rope in `rope_parameters`; 4 has `rope_theta` and `rope_scaling`."""
    parameters = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    parameters.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return parameters


def _rope(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """Frequencies [rotary dimensions / 2] and the factor on cos and sin, as transformers computes them."""
    parameters = _rope_parameters(hf_config)
    kind = parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        raise ModelFileError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if kind == "default":
        dim = int(hf_config.head_dim * partial)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    if partial != 1.0 and factor != 1.0:
        raise ModelFileError(f"config.json: rope type {kind!r} with partial_rotary_factor {partial} is not supported")
    return frequencies.float(), float(factor)
