"""Limits on what the host waits for and copies, on pretended GPUs; docs/performance.md has the table."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import run_distributed
from tests.pretended_gpu.counting import counts
from tests.tiny_run import TinyRun

# With loss.kernels: torch. waits: item(), tolist(), nonzero(). Pageable copies and those back wait, too.
LIMITS = {
    "decode step": {"pinned": 1, "waits": 1},  # the blocks of every running response
    "scored row": {"pinned": 3, "copies_back": 1, "waits": 1},  # NaN looked for by the torch kernels
    "response in a scored row": {},
    "micro-batch built": {"pinned": 2, "copies_back": 2},  # the prune weights of its two responses
    "micro-batch trained on": {
        "pinned": 2,
        "waits": 2,
    },  # NaN looked for by the torch kernels; Megatron-Core's embedding
}


def test_waits_and_copies_stay_within_limits(tmp_path: Path):
    layer = {"implementation": "local"}
    TinyRun(tmp_path, train={"steps": 1, "warmup_steps": 0}, checkpoint={"every": 0}, student=layer, teacher=layer)
    overrides = ["device=cuda", "loss.kernels=torch"]
    for found in run_distributed(2, counts, tmp_path, overrides, fresh=True, start="spawn"):
        for what, limits in LIMITS.items():
            above = {k: n for k, n in found[what].items() if k != "places" and n > limits.get(k, 0)}
            assert not above, f"{what}: {found[what]['places']}"
