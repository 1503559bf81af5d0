"""Measures an import of a random Qwen3-1.7B (its public shape): time and peak memory of every rank.

    python tools/benchmark/convert.py --work DIR [--tp 2 --pp 2 --layers 28]

Needs about 7 GB of disk and, at TP2 x PP2, 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS.parent))

from megatron_opd.weights.hf_files import SafetensorsWriter  # noqa: E402

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def make_model(directory: Path, layers: int) -> None:
    """Writes config.json and random bf16 safetensors, a tensor at a time."""
    config = SHAPE | {"num_hidden_layers": layers}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    layer = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (groups, hidden),
        "self_attn.v_proj": (groups, hidden),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    writer = SafetensorsWriter(directory, ((n, s, torch.bfloat16) for n, s in shapes.items()), 2_000_000_000)
    for name, shape in shapes.items():
        writer.write(name, torch.randn(shape, dtype=torch.bfloat16) * 0.02)
    writer.finish()


def equal_files(a: Path, b: Path) -> int:
    """Compares two directories tensor by tensor; returns how many there are, raises AssertionError at a difference."""

    def tensors(directory: Path):
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    yield name, file

    places = dict(tensors(b))
    count = 0
    for name, file in tensors(a):
        with safe_open(file, "pt") as one, safe_open(places.pop(name), "pt") as other:
            assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name
        count += 1
    assert not places, f"extra tensors: {sorted(places)[:3]}"
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="a new directory; removed after")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    hf, converted, back = (args.work / name for name in ("hf", "converted", "back"))
    make_model(hf, args.layers)
    size = sum(file.stat().st_size for file in hf.iterdir())
    print(f"made {hf}: {size / 2**30:.2f} GiB", flush=True)
    layout = ["--tp", str(args.tp), "--pp", str(args.pp)]
    commands = (
        ["import", "--hf", str(hf), "--out", str(converted), *layout],
        ["export", "--megatron", str(converted), "--out", str(back), *layout],
    )
    try:
        for command in commands:
            began = time.monotonic()
            env = {**os.environ, "COLUMNS": "100"}
            code = subprocess.run([sys.executable, str(TOOLS / "convert.py"), *command], env=env).returncode
            if code:
                return code
            print(f"{command[0]}: {time.monotonic() - began:.1f} s with the start of its processes", flush=True)
        print(f"{equal_files(hf, back)} tensors came back bit-identical")
    finally:
        shutil.rmtree(args.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
