"""What the parts of the GPU benchmark share: sizes, models' shapes, timing, a report that survives what goes wrong.

Imported by the driver, which must not load torch: functions import it where they need it.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.common import peak_memory, summary

K = 16  # candidates per position, as the method has it

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,  # as the embedded example's tokenizer has them
}


def _shape(hidden: int, ffn: int, layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    own = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return _QWEN3 | own | changes


MODELS = {  # public shapes of Qwen3; `tiny` exercises the scripts
    "0.6B": _shape(1024, 3072, 28, 16),
    "1.7B": _shape(2048, 6144, 28, 16),
    "4B": _shape(2560, 9728, 36, 32),
    "8B": _shape(4096, 12288, 36, 32, tie_word_embeddings=False),
    "tiny": _shape(64, 128, 2, 4, vocab_size=512, num_key_value_heads=2, head_dim=32),
}

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "kernel_tokens": [4096, 16384],
        "tensor": [1, 2, 4, 8],
        "vocab": 151936,
        "loss_tokens": [16384, 32768],
        "loss_hidden": 2560,
        "loss_chunk": 1024,
        "train": ["0.6B", "1.7B", "4B"],
        "train_responses": 32,
        "train_tokens": 2048,
        # tried from the left until one fits: tokens of a micro-batch, recomputation, fused head, with the optimizer
        "train_settings": [
            [16384, "none", False, True],
            [8192, "none", True, True],
            [8192, "full", True, True],
            [8192, "none", True, False],
            [8192, "full", False, False],
        ],
        "score": ["4B", "8B"],
        "score_responses": 32,
        "score_tokens": 2048,
        "score_microbatch": 16384,
        "student": "0.6B",
        "teacher": "4B",
        "prompts": 16,
        "responses": 4,
        "budget": 512,
        "segment": 128,
        "steps": 3,
        "shift_prompts": 32,
        "shift_tokens": 512,
        "curve_steps": 100,
        "curve_tokens": 128,
        "curve_responses": 100,
        "repeats": 10,
        "copy_bytes": 1 << 30,
        "matmul": 8192,
    },
    "tiny": {
        "kernel_tokens": [32],
        "tensor": [1, 2],
        "vocab": 500,
        "loss_tokens": [64],
        "loss_hidden": 32,
        "loss_chunk": 16,
        "train": ["tiny"],
        "train_responses": 2,
        "train_tokens": 32,
        "train_settings": [[64, "none", False, True], [64, "none", True, False]],
        "score": ["tiny"],
        "score_responses": 2,
        "score_tokens": 32,
        "score_microbatch": 64,
        "student": "tiny",
        "teacher": "tiny",
        "prompts": 2,
        "responses": 2,
        "budget": 16,
        "segment": 4,
        "steps": 1,
        "shift_prompts": 4,
        "shift_tokens": 16,
        "curve_steps": 2,
        "curve_tokens": 16,
        "curve_responses": 2,
        "repeats": 2,
        "copy_bytes": 1 << 20,
        "matmul": 128,
    },
}

# Dense bf16 and FP8 peaks in FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
PEAKS = {
    "H100 PCIe": (756e12, 1513e12),
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "L40S": (362e12, 733e12),
    "A100": (312e12, None),
}


def write_model(directory: Path, name: str) -> Path:
    """A directory with the config.json of a shape; its parameters are made on the device (`random_model`)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    return directory


def forward_flops(name: str, tokens: int, mean_context: float) -> float:
    """Of a forward pass: 2 per parameter of linear layers and head and token, 4 per attention width and context."""
    m = MODELS[name]
    heads, groups, dim = m["num_attention_heads"], m["num_key_value_heads"], m["head_dim"]
    attention = m["hidden_size"] * (2 * heads + 2 * groups) * dim
    layer = attention + 3 * m["hidden_size"] * m["intermediate_size"]
    weights = m["num_hidden_layers"] * layer + m["hidden_size"] * m["vocab_size"]
    return tokens * (2.0 * weights + 4.0 * m["num_hidden_layers"] * heads * dim * mean_context)


def mean_context(lengths: list[int]) -> float:
    """Positions that a token sees on average in sequences of these lengths under a causal mask."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


class Bench:
    """The device, and clocks for it."""

    def __init__(self, kind: str, sizes: dict[str, Any]) -> None:
        import torch

        self.kind, self.sizes = kind, sizes
        self.device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int | None = None, warmup: int = 2) -> dict[str, Any]:
        """Median, quartiles and values of the seconds that `work` takes, each run by itself."""
        found = []
        for number in range(-warmup, repeats or self.sizes["repeats"]):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            if number >= 0:
                found.append(time.perf_counter() - started)
        return summary(found)

    def kernel_seconds(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Seconds on the device; the same as `seconds` on a CPU. The device has other work while the host prepares
        this one, so that its launches are not in the time."""
        if self.kind != "cuda":
            return self.seconds(work)
        import torch

        n = self.sizes["matmul"]
        busy = torch.ones(n, n, dtype=torch.bfloat16, device=self.device)
        found = []
        for number in range(-3, self.sizes["repeats"]):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(3):  # a few milliseconds
                busy @ busy
            start.record()
            work()
            end.record()
            end.synchronize()
            if number >= 0:
                found.append(start.elapsed_time(end) / 1000)
        return summary(found)

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """Most bytes that torch holds at once while `work` runs, beyond what it held before."""
        return peak_memory(work, self.kind)

    def free(self) -> None:
        gc.collect()
        if self.kind == "cuda":
            import torch

            torch.cuda.empty_cache()

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy within the device's memory."""
        import torch

        source = torch.ones(self.sizes["copy_bytes"], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.kernel_seconds(lambda: target.copy_(source))["median"]

    def matmul_rate(self) -> float:
        """FLOP/s of a square bf16 product."""
        import torch

        n = self.sizes["matmul"]
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return 2 * n**3 / self.kernel_seconds(lambda: a @ b)["median"]

    def peaks(self) -> tuple[float | None, float | None]:
        """The data sheet's bf16 and FP8 FLOP/s; None where the device is not listed."""
        if self.kind != "cuda":
            return None, None
        import torch

        name = torch.cuda.get_device_name(0)
        return next((peak for part, peak in PEAKS.items() if part in name), (None, None))


class Report:
    """Entries of one part, written to a file as they come, so that a part that is stopped keeps what it has."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, []

    def add(self, **entry: Any) -> None:
        self.entries.append(entry | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.entries, default=str))
        scratch.replace(self.path)
        plain = {k: v for k, v in entry.items() if isinstance(v, (str, int, float, bool))}
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
        print("  " + "  ".join(words), flush=True)

    @contextmanager
    def attempt(self, bench: Bench, **what: Any):
        """What fails inside is an entry with its error, and the part goes on."""
        bench.free()  # before and not after: an exception still holds the frames that it left
        try:
            yield
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.add(**what, error=text[:600])
