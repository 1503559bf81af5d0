"""What a Hugging Face directory says about a model, in Megatron-Core's terms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opd.compat import gpt_model, mbridge
from megatron_opd.weights.families import FAMILIES, Family
from megatron_opd.weights.hf_files import EMBEDDING, ModelFileError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the sequence length
# Transformer Engine fuses these norms into the linear layer behind them; the local layers keep them apart.
_LOCAL_NORMS = {
    "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
}


class ModelBridge:
    """One model's configuration and names in both worlds.

    Attributes:
        hf_config: the Hugging Face configuration.
        config: Megatron-Core's TransformerConfig with this layout's parallel sizes.
        vocab_size: tokens of the Hugging Face model, without padding.
        tied: whether the output layer shares the embedding's parameters.
        rope_frequencies: [rotary dimensions / 2] float32, exactly transformers', scaling included.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        family: Family,
        dtype: torch.dtype,
        groups: ProcessGroupCollection,
        virtual_pipeline: int,
        overrides: dict[str, Any],
    ) -> None:
        self.hf_config = hf_config
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self.vocab_size = int(hf_config.vocab_size)
        self.rope_frequencies, attention_factor = _rope(hf_config)
        names = {**_LOCAL_NORMS, **family.names}
        if self.tied:
            names[gpt_model.HEAD] = names.get(gpt_model.EMBEDDING, [EMBEDDING])
        fields = {"hidden_dropout": 0.0, **family.fields(hf_config), **overrides}
        self._names = mbridge.Bridge(family.like, hf_config, dtype, groups, virtual_pipeline, names, fields)
        self.config: TransformerConfig = self._names.config
        if attention_factor != 1.0:
            # transformers scales cos and sin, hence q and k, by the factor; Megatron-Core's rope has no such place
            self.config.softmax_scale = attention_factor**2 / math.sqrt(self.config.kv_channels)

    @property
    def gpt_arguments(self) -> dict[str, Any]:
        """Keyword arguments of GPTModel that follow from the Hugging Face configuration, but for its vocabulary."""
        parameters = rope_parameters(self.hf_config)
        return {
            "max_sequence_length": self.hf_config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": parameters["rope_theta"],
            "share_embeddings_and_output_weights": self.tied,
        }

    def hf_names(self, name: str) -> list[str]:
        """Hugging Face names of the tensors that make up one Megatron-Core parameter.

        `name` carries global numbers: `decoder.layers.7.mlp.experts.linear_fc1.weight3` is layer 7, expert 3.
        Raises ModelFileError where the family has no such parameter.
        """
        try:
            return self._names.hf_names(name)
        except KeyError as error:
            family = self.hf_config.model_type
            raise ModelFileError(f"{family} models have no parameter {name} in Hugging Face format") from error

    def to_megatron(self, name: str, tensors: list[Tensor]) -> Tensor:
        """Merges one tensor-parallel rank's slices of `hf_names(name)` into its Megatron-Core parameter."""
        return self._names.to_megatron(name, tensors)

    def to_hf(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The inverse of `to_megatron`, on a whole parameter or on one rank's slice; in the order of `hf_names`."""
        return self._names.to_hf(name, tensor)


def load_bridge(
    hf_dir: str | Path,
    dtype: torch.dtype,
    groups: ProcessGroupCollection,
    virtual_pipeline: int = 1,
    overrides: dict[str, Any] | None = None,
    family: Family | None = None,
) -> ModelBridge:
    """Reads `config.json` of a Hugging Face or converted directory; no model is built and no tensor is read.

    `overrides` are TransformerConfig fields that win over what follows from the model; `family` is one that is not
    built in. Raises ModelFileError for a missing or unreadable config, an architecture or a variant of it that would
    not compute what transformers computes.
    """
    hf_config = read_hf_config(hf_dir, family)
    family = family or FAMILIES[hf_config.model_type]
    return ModelBridge(hf_config, family, dtype, groups, virtual_pipeline, overrides or {})


def read_hf_config(hf_dir: str | Path, family: Family | None = None) -> PretrainedConfig:
    """The configuration of a supported model; never runs code of the directory (trust_remote_code stays off).

    Raises ModelFileError as `load_bridge` does.
    """
    path = Path(hf_dir, "config.json")
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}; a model directory needs a config.json") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from error
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if family is None and (not isinstance(model_type, str) or model_type not in FAMILIES):
        named = architectures if isinstance(architectures, list) else []
        name = "/".join(map(str, named)) or "no architecture named"
        raise ModelFileError(
            f"{path}: unknown architecture {name} (model_type {model_type!r}); supported model types: "
            f"{', '.join(FAMILIES)}, and one of your own (student.family: MODULE:NAME)"
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelFileError(f"{path}: quantised checkpoint (quant_method {method!r}); use the unquantised one")
    try:
        hf_config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its validators raise
        raise ModelFileError(f"{path}: {error}") from error
    _refuse_variants(path, hf_config, family.only if family else {})
    _refuse_rope(path, raw, hf_config)
    if getattr(hf_config, "head_dim", None) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    return hf_config


def _refuse_variants(path: Path, hf_config: PretrainedConfig, only: Mapping[str, Any]) -> None:
    """Options of the built-in families that Megatron-Core would silently leave out, and those of `only`."""
    unsupported = {
        "hidden_act": (hf_config.hidden_act, "silu"),
        "use_sliding_window": (getattr(hf_config, "use_sliding_window", False) or False, False),
        "attention_bias": (getattr(hf_config, "attention_bias", False) or False, False),  # has a bias at o_proj too
        "mlp_bias": (getattr(hf_config, "mlp_bias", False) or False, False),
        "mlp_only_layers": (getattr(hf_config, "mlp_only_layers", None) or [], []),
        "decoder_sparse_step": (getattr(hf_config, "decoder_sparse_step", 1), 1),
        "layer_types": (sorted(set(getattr(hf_config, "layer_types", None) or []) - {"full_attention"}), []),
        **{key: (getattr(hf_config, key, value), value) for key, value in only.items()},
    }
    for key, (value, wanted) in unsupported.items():
        if value != wanted:
            family = hf_config.model_type
            raise ModelFileError(f"{path}: {key}: {value!r} is not supported for {family}, only {wanted!r}")
    if getattr(hf_config, "num_experts_per_tok", None) == 1 and getattr(hf_config, "norm_topk_prob", False):
        # whose weight is then 1, whatever the router says; Megatron-Core's would be its probability
        raise ModelFileError(
            f"{path}: num_experts_per_tok: 1 is not supported with norm_topk_prob: true, only with false"
        )


def _refuse_rope(path: Path, raw: dict[str, Any], hf_config: PretrainedConfig) -> None:
    """Rotary settings that the implementations read differently.

    `partial_rotary_factor`: transformers 5 rotates every dimension in the built-in families, or fails where the rope
    is scaled; transformers 4, vLLM and Megatron-Core rotate a part.
    """
    settings = [raw, *(raw.get(key) or {} for key in ("rope_parameters", "rope_scaling")), rope_parameters(hf_config)]
    for values in settings:
        partial = values.get("partial_rotary_factor")
        if partial is not None and partial != 1:
            raise ModelFileError(
                f"{path}: partial_rotary_factor: {partial!r} is not supported for {hf_config.model_type}, whose "
                "implementations disagree on it: transformers rotates all dimensions, others a part; only 1.0"
            )
        nested = [key for key, value in values.items() if values is not raw and isinstance(value, dict)]
        if nested:
            raise ModelFileError(f"{path}: rope parameters of their own for {', '.join(nested)} are not supported")


def rope_parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    """transformers 5 keeps everything about rope in `rope_parameters`; 4 has `rope_theta` and `rope_scaling`."""
    parameters = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    parameters.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return parameters


def _rope(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """Frequencies [rotary dimensions / 2] and the factor on cos and sin, as transformers computes them."""
    parameters = rope_parameters(hf_config)
    kind = parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        raise ModelFileError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    if kind == "default":
        exponents = torch.arange(0, hf_config.head_dim, 2, dtype=torch.int64).float() / hf_config.head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return frequencies.float(), float(factor)
