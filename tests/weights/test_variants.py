"""Configurations that implementations read differently: refused by name, or computed as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_opd.compat.cpu_platform import apply_cpu_platform
from megatron_opd.config import ModelConfig, ParallelConfig
from megatron_opd.models.build import build_model
from megatron_opd.models.compare import difference, megatron_logits
from megatron_opd.parallel.groups import teacher_layout
from megatron_opd.weights.bridge import read_hf_config
from megatron_opd.weights.hf_files import HFTensors, ModelFileError
from tests.distributed import run_distributed
from tests.models.tiny_families import VOCAB, make

TOKENS = torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(1))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Family, keys written into its config.json, and what transformers computes nevertheless.
COMPUTED = [
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    ("qwen3_moe", {"num_experts_per_tok": 4}),
    ("qwen3", {"partial_rotary_factor": 1.0}),
    ("qwen2", {"partial_rotary_factor": None, "layer_types": ["full_attention"] * 4}),
]
REFUSED = [
    ("llama2", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor: 0.5"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ("qwen2", {"rope_parameters": None, "rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "of their own for"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types: .'sliding_attention'"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok: 1 is not supported with norm_topk_prob: true"),
]


def rewrite(directory: Path, keys: dict) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def relative_differences(rank: int, world_size: int, root: Path) -> list[float]:
    apply_cpu_platform()
    found = []
    for number in range(len(COMPUTED)):
        model = AutoModelForCausalLM.from_pretrained(root / str(number), dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = model(TOKENS[None]).logits[0]
        config = ModelConfig(model=str(root / str(number)), precision="fp32")
        built = build_model("teacher", config, teacher_layout(ParallelConfig()), torch.device("cpu"))
        found.append(difference(megatron_logits(built, TOKENS), wanted).relative)
    return found


def test_what_transformers_computes_is_computed(tmp_path):
    for number, (family, keys) in enumerate(COMPUTED):
        rewrite(make(family, tmp_path / str(number)), keys)
    for case, relative in zip(COMPUTED, run_distributed(1, relative_differences, tmp_path)[0], strict=True):
        assert relative < 1e-5, case


@pytest.mark.parametrize("family, keys, message", REFUSED)
def test_what_would_be_computed_differently_is_refused(tmp_path, family, keys, message):
    rewrite(make(family, tmp_path), keys)
    with pytest.raises(ModelFileError, match=message):
        read_hf_config(tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("shards"), shard="20KB")


def head(directory: Path) -> torch.Tensor:
    with HFTensors(directory) as files:
        return files.read("lm_head.weight")


def test_an_index_left_behind_beside_a_whole_file(shards, tmp_path):
    """As transformers, which does not look at the index then."""
    make("qwen3", tmp_path)
    other = {name: tensor + 1 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_bytes((shards / "model.safetensors.index.json").read_bytes())
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")  # not looked at either
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight
    assert torch.equal(head(tmp_path), wanted.detach())
    assert not torch.equal(head(tmp_path), head(shards))


def test_a_whole_file_and_all_shards_are_refused(shards, tmp_path):
    make("qwen3", tmp_path)
    for file in shards.glob("model*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelFileError, match=r"both model.safetensors and the \d+ shards .* stale"):
        HFTensors(tmp_path)


def test_the_same_for_pickled_parameters(shards, tmp_path):
    make("qwen3", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"pytorch_model-{place}.bin" for name, place in index["weight_map"].items()}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with HFTensors(tmp_path, allow_pickle=True) as files:
        assert torch.equal(files.read("lm_head.weight"), head(shards))


def test_an_index_that_points_elsewhere_is_refused(shards, tmp_path):
    index = {"weight_map": {"lm_head.weight": f"../{shards.name}/model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="no file of this directory"):
        HFTensors(tmp_path)


def load_tied(rank: int, world_size: int, root: Path) -> list[str]:
    """What building each directory says; the world has two pipeline stages, the head lies on the second."""
    apply_cpu_platform()
    said = []
    parallel = ParallelConfig(pipeline=world_size)
    for name in ("equal", "different"):
        config = ModelConfig(model=str(root / name), precision="fp32", parallel=parallel)
        try:
            build_model("teacher", config, teacher_layout(parallel), torch.device("cpu"))
            said.append("")
        except ModelFileError as error:
            said.append(str(error))
    return said


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to(tmp_path):
    """transformers keeps it; Megatron-Core and vLLM have no place for it. Training and evaluation refuse it, too."""
    for name, shift in (("equal", 0.0), ("different", 1e-3)):
        file = make("qwen3_tied", tmp_path / name) / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift
        save_file(tensors, file, metadata={"format": "pt"})
    for equal, different in run_distributed(2, load_tied, tmp_path):
        assert equal == ""
        assert "lm_head.weight differs from model.embed_tokens.weight" in different
