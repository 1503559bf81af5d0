"""compat/mbridge.py: names and merged tensors, against what Hugging Face's checkpoints hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from megatron_opd.compat.mbridge import CLASSES, TABLES, Bridge
from tests.models.tiny_families import make

GROUPS = SimpleNamespace()  # one rank: no group at all
LAYER = "decoder.layers.3."


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mbridge")
    families = {"llama2": "llama", "qwen2": "qwen2", "qwen3_tied": "qwen3", "qwen3_moe": "qwen3_moe"}
    return {
        kind: AutoConfig.from_pretrained(make(family, root / family), local_files_only=True)
        for family, kind in families.items()
    }


def bridge(kind: str, config, **names) -> Bridge:
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return Bridge(
        kind, config, torch.float32, GROUPS, 1, names, {"hidden_dropout": 0.0, "fp32_residual_connection": True}
    )


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_the_config_has_the_model_s_sizes_and_our_fields(kind, configs):
    made = bridge(kind, configs[kind]).config
    assert (made.num_layers, made.hidden_size, made.num_query_groups) == (4, 32, configs[kind].num_key_value_heads)
    assert made.fp32_residual_connection is True, "given fields win"
    assert made.add_qkv_bias is (kind == "qwen2") and made.qk_layernorm is kind.startswith("qwen3")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_q_k_v_and_gate_up_are_merged_as_megatron_core_reads_them(kind, configs):
    config = configs[kind]
    one = bridge(kind, config)
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    names = one.hf_names(LAYER + "self_attention.linear_qkv.weight")
    assert names == [f"model.layers.3.self_attn.{x}_proj.weight" for x in "qkv"]
    q, k, v = (torch.randn(n * dim, config.hidden_size) for n in (heads, groups, groups))
    merged = one.to_megatron(LAYER + "self_attention.linear_qkv.weight", [q, k, v])
    by_group = merged.view(groups, (heads // groups + 2) * dim, config.hidden_size)
    per = heads // groups * dim
    for g in range(groups):  # each key/value group's queries, then its key and its value
        expected = [q[g * per : (g + 1) * per], k[g * dim : (g + 1) * dim], v[g * dim : (g + 1) * dim]]
        assert torch.equal(by_group[g], torch.cat(expected))
    for back, original in zip(one.to_hf(LAYER + "self_attention.linear_qkv.weight", merged), (q, k, v), strict=True):
        assert torch.equal(back, original)
    gate, up = torch.randn(2, config.intermediate_size, config.hidden_size)
    merged = one.to_megatron(LAYER + "mlp.linear_fc1.weight", [gate, up])
    assert torch.equal(merged, torch.cat([gate, up]))
    assert all(torch.equal(a, b) for a, b in zip(one.to_hf(LAYER + "mlp.linear_fc1.weight", merged), (gate, up)))


def test_experts_are_named_by_number(configs):
    one = bridge("qwen3_moe", configs["qwen3_moe"])
    assert one.hf_names(LAYER + "mlp.experts.linear_fc2.weight2") == ["model.layers.3.mlp.experts.2.down_proj.weight"]
    assert one.hf_names(LAYER + "mlp.router.weight") == ["model.layers.3.mlp.gate.weight"]


def test_given_names_are_of_one_model_alone(configs):
    before = {kind: [dict(getattr(CLASSES[kind], table)) for table in TABLES] for kind in CLASSES}
    own = bridge(
        "qwen3",
        configs["qwen3"],
        **{
            "output_layer.weight": ["head"],
            "pre_mlp_layernorm.weight": ["l.{layer_number}.n2"],
            "input_layernorm.weight": ["l.{layer_number}.n1"],
            "self_attention.linear_proj.weight": ["l.{layer_number}.o"],
        },
    )
    assert own.hf_names("output_layer.weight") == ["head"]
    assert own.hf_names(LAYER + "pre_mlp_layernorm.weight") == ["l.3.n2"]
    assert own.hf_names(LAYER + "input_layernorm.weight") == ["l.3.n1"]
    assert own.hf_names(LAYER + "self_attention.linear_proj.weight") == ["l.3.o"]
    other = bridge("qwen3", configs["qwen3"])  # tied: mbridge itself would change the class's table here
    assert other.hf_names("output_layer.weight") == ["lm_head.weight"]
    assert before == {kind: [dict(getattr(CLASSES[kind], table)) for table in TABLES] for kind in CLASSES}
    with pytest.raises(KeyError):
        other.hf_names(LAYER + "cross_attention.weight")
