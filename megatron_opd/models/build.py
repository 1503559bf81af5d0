"""Builds a student or a teacher: Megatron-Core's GPTModel in its own layout, with its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_opd.compat.gpt_model import build_chunk, set_rotary
from megatron_opd.config import ConfigError, ModelConfig
from megatron_opd.config.base import LARGEST_COUNT
from megatron_opd.models.fp8 import shape_problems
from megatron_opd.models.fp8_scales import learn_scales
from megatron_opd.models.model import Model
from megatron_opd.models.packed import PackedRotary
from megatron_opd.models.specs import block_spec, use_transformer_engine
from megatron_opd.parallel.groups import Layout
from megatron_opd.weights.bridge import load_bridge
from megatron_opd.weights.families import own_family
from megatron_opd.weights.loading import load_parameters
from megatron_opd.weights.parameters import WHOLE, local_parameters

SHARD_MULTIPLE = 64  # ids of a shard of the vocabulary: kernels read 16 bytes at once, and spill at odd widths
_SIZES = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
_OPTIONAL_SIZES = (
    *("hidden_size", "vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
)


def read_hf_config(directory: str, key: str) -> dict[str, Any]:
    """The model's config.json, whose sizes are numbers that a model can have.

    Raises:
        ConfigError: naming `key` where the directory or the file is missing or broken.
    """
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise ConfigError(f"{key}: no directory {directory}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise ConfigError(
            f"{key}: {directory} has no config.json; give a Hugging Face or converted directory"
        ) from None
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} is not valid JSON: {error}") from None
    sizes = {name: values[name] for name in _OPTIONAL_SIZES if values.get(name) is not None}
    sizes |= {name: values.get(name) for name in _SIZES}
    wrong = [f"{n}: {v!r}" for n, v in sizes.items() if type(v) is not int or not 0 < v <= LARGEST_COUNT]
    if wrong:
        raise ConfigError(f"{key}: {path}: these must be numbers above 0: {', '.join(wrong)}")
    return values


def check_layout(name: str, model: ModelConfig, world_size: int | None = None) -> None:
    """Raises ConfigError, listing everything, where the layout does not divide the model's heads, width or layers."""
    hf = read_hf_config(model.model, f"{name}.model")
    parallel, problems = model.parallel, []
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    stages = parallel.pipeline * parallel.virtual_pipeline
    for what, value in (
        ("attention heads", heads),
        ("key/value heads", kv_heads),
        ("FFN width", hf["intermediate_size"]),
    ):
        if value % parallel.tensor:
            divisors = [n for n in range(1, value + 1) if value % n == 0 and kv_heads % n == 0 and heads % n == 0]
            problems.append(
                f"{name}.parallel.tensor: {parallel.tensor} does not divide the {value} {what}; "
                f"what divides all heads: {', '.join(map(str, divisors))}"
            )
    if hf["num_hidden_layers"] % stages:
        problems.append(
            f"{name}.parallel.pipeline: {parallel.pipeline} (x virtual_pipeline {parallel.virtual_pipeline}) does not "
            f"divide the {hf['num_hidden_layers']} layers"
        )
    problems += shape_problems(name, model, hf)
    experts = hf.get("num_experts") or hf.get("num_local_experts")  # transformers 4 and 5
    if parallel.expert > 1 and (not experts or experts % parallel.expert):
        problems.append(f"{name}.parallel.expert: {parallel.expert} does not divide the {experts or 0} experts")
    if problems:
        raise ConfigError("\n".join(problems))


def build_model(name: str, model: ModelConfig, layout: Layout, device: torch.device, load: bool = True) -> Model:
    """Builds this rank's chunks and, unless `load` is false, fills them from `model.model`. Collective over its ranks.

    Raises:
        ConfigError: a layout that does not divide, FP8 or Transformer Engine where it cannot run, an unknown
            architecture.
        ModelFileError: parameters that do not match.
    """
    check_layout(name, model)
    cpu = device.type == "cpu"
    transformer_engine = use_transformer_engine(name, model, cpu)
    if not cpu and not get_cuda_rng_tracker().is_initialized():
        model_parallel_cuda_manual_seed(0)  # layers ask for its generators, though nothing here is random
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.precision]
    parallel, groups = model.parallel, layout.groups
    vp = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    overrides = _config_overrides(model, dtype, cpu)
    overrides["moe_grouped_gemm"] = transformer_engine  # local layers hold experts one by one
    if cpu:
        overrides["bias_activation_fusion"] = False  # compiled for every shape, by a C++ compiler
    overrides["apply_rope_fusion"] = transformer_engine  # the kernel takes packed rows as they are
    family = own_family(f"{name}.family", model.family)
    bridge = load_bridge(model.model, dtype, groups, parallel.virtual_pipeline, overrides, family)
    config = bridge.config
    vocab_size = bridge.vocab_size
    arguments = bridge.gpt_arguments
    multiple = SHARD_MULTIPLE * parallel.tensor
    padded = -(-vocab_size // multiple) * multiple

    chunks = []
    stages, stage = groups.pp.size(), groups.pp.rank()
    for number in range(parallel.virtual_pipeline):
        chunk = build_chunk(
            config,
            block_spec(config, transformer_engine, number if vp else None, stage),
            padded,
            stage == 0 and number == 0,
            stage == stages - 1 and number == parallel.virtual_pipeline - 1,
            groups,
            number if vp else None,
            arguments,
        )
        set_rotary(chunk, bridge.rope_frequencies, PackedRotary)
        chunks.append(chunk if cpu else chunk.cuda())
    built = Model(name, chunks, config, layout, bridge, vocab_size, padded, device, transformer_engine)
    mark_sharded(built)
    if load:
        load_parameters(built, model.model, model.allow_pickle)
    if model.fp8 and model.fp8_recipe == "delayed":
        learn_scales(built)
    return built


def mark_sharded(model: Model) -> None:
    """Marks the parameters that tensor ranks share out: the gradient norm counts the others on one rank alone.

    Megatron-Core marks them while it initialises parameters, which is skipped here.
    """
    tensors = [tensor for chunk in model.chunks for tensor in chunk.parameters()]
    for (described, _), tensor in zip(local_parameters(model), tensors, strict=True):
        if described.split != WHOLE:
            tensor.tensor_model_parallel = True


def _config_overrides(model: ModelConfig, dtype: torch.dtype, cpu: bool) -> dict[str, Any]:
    """What our config and the platform say of Megatron-Core's TransformerConfig."""
    values: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "sequence_parallel": model.parallel.sequence,
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,  # our losses are already divided by the global token count
        # With virtual stages a stage goes on while its output is being sent, and then frees it. NCCL keeps the memory
        # until the send has ended; gloo reads it to the end and would send what has been written there since.
        "deallocate_pipeline_outputs": not (cpu and model.parallel.virtual_pipeline > 1),
        "use_cpu_initialization": cpu,
        "perform_initialization": False,  # the parameters are loaded
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": not cpu,
        "batch_p2p_comm": False,
        "cp_comm_type": "p2p",  # Transformer Engine passes keys and values round; our own core gathers them
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if model.recompute == "full":
        values |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "selective":
        values |= {"recompute_granularity": "selective"}
    if model.fp8:
        values |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe, "fp8_param": model.fp8_params}
        if model.fp8_bf16_ends:
            values |= {
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": model.fp8_bf16_ends,
                "num_layers_at_end_in_bf16": model.fp8_bf16_ends,
            }
    return values
