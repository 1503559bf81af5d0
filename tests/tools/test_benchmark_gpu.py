"""The GPU benchmark's scripts on a CPU, at sizes that say nothing about speed; what needs a GPU is said to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import LIMIT_S, run_distributed
from tests.tiny_run import REPOSITORY, child_environment

TOOLS = str(REPOSITORY / "tools")
sys.path.insert(0, TOOLS)
from benchmark import gpu  # noqa: E402
from benchmark.gpu_common import MODELS, forward_flops, mean_context  # noqa: E402


def parts(rank: int, world: int, folder: Path, names: tuple[str, ...]) -> dict[str, list[dict]]:
    """Every part's entries, in one process."""
    import importlib

    sys.path.insert(0, TOOLS)
    from benchmark.gpu_common import SIZES, Bench, Report
    from benchmark.gpu_worker import PLACES

    found = {}
    for name in names:
        path = folder / f"{name}.json"
        getattr(importlib.import_module(PLACES[name]), name)(Bench("cpu", SIZES["tiny"]), Report(path))
        found[name] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("gpu")
    return run_distributed(1, parts, folder, ("kernels", "memory", "train", "score", "steps", "fp8"), fresh=True)[0]


def plain(found: list[dict]) -> list[dict]:
    """What did not need a GPU; the rest must have said that it does."""
    for entry in found:
        assert "error" not in entry or "needs a GPU" in entry["error"], entry
    return [entry for entry in found if "error" not in entry]


def test_kernels_are_checked_and_compared(entries):
    found = plain(entries["kernels"])
    assert found[0]["gb_per_s"] > 0 and found[0]["backend"] == "torch"
    kinds = [(e["what"], e["tensor"]) for e in found[1:]]
    assert kinds == [("statistics", 1), ("backward", 1), ("statistics", 2), ("backward", 2)]
    assert all(e["of_floor"] > 0 and e["faster_than_torch"] > 0 for e in found[1:])
    assert set(found[1]["torch"]) == {"log_softmax", "topk", "gather"}


def test_the_fused_loss_is_the_same_loss(entries):
    whole, fused, compared = plain(entries["memory"])
    assert fused["loss"] == pytest.approx(whole["loss"], rel=0.02) and compared["loss_difference"] < 0.02
    assert compared["memory"] == fused["peak_bytes"] / whole["peak_bytes"]


def test_training_and_scoring_in_each_precision(entries):
    trained = plain(entries["train"])[1:]
    assert [e["precision"] for e in trained] == ["bf16", "bf16, local layers"]
    assert all(e["tokens_per_s"] > 0 and e["tflops"] > 0 and e["peak_bytes"] > 0 for e in trained)
    scored = plain(entries["score"])
    assert [e["precision"] for e in scored] == ["bf16", "bf16, local layers"]
    failed = [e["precision"] for e in entries["score"] if "error" in e]
    assert failed == ["FP8 tensorwise", "FP8 blockwise", "FP8 tensorwise, FP8 parameters"]
    cost = gpu.teacher_cost({"train": {"entries": trained}, "score": {"entries": scored}})
    assert len(cost) == 4
    assert cost[0]["teacher_tokens_per_student_token"] == scored[0]["tokens_per_s"] / trained[0]["tokens_per_s"]


def test_whole_steps_of_each_preset(entries):
    found = plain(entries["steps"])
    assert [e["preset"] for e in found] == ["off", "paper", "in_flight"]
    off, paper, in_flight = found
    assert off["tokens_generated"] == paper["tokens_generated"] == off["tokens_trained"] == 4 * 16
    assert in_flight["tokens_trained"] == 4 * 7  # the eighth event of 2 / 16 each spends an answer
    shares = {k: v for k, v in off.items() if k.endswith("_share")}
    assert shares["score_share"] > 0 and sum(shares.values()) == pytest.approx(1, abs=0.1)


def test_the_shift_and_the_curves(entries):
    found = plain(entries["fp8"])
    rows = [e for e in found if e["what"] == "shift" and "student" in e]
    assert len(rows) == 2 * 4 and rows[0]["overlap"] > 0.2
    curves = [e for e in found if e["what"] == "curve"]
    assert [len(e["loss"]) for e in curves] == [2, 2]
    assert curves[1]["loss"][0] == pytest.approx(curves[0]["loss"][0], rel=0.3)


def test_flops_of_a_known_shape():
    """Qwen3-0.6B has 0.44e9 parameters in its layers and 0.156e9 in its head."""
    tokens = 1000
    assert forward_flops("0.6B", tokens, 0) / tokens / 2 == pytest.approx(0.44e9 + 0.156e9, rel=0.01)
    attention = forward_flops("0.6B", tokens, 512) - forward_flops("0.6B", tokens, 0)
    assert attention == 4 * 28 * 16 * 128 * 512 * tokens
    assert mean_context([3, 1]) == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert all(m["head_dim"] * m["num_attention_heads"] % 128 == 0 for m in MODELS.values())


def test_a_part_that_is_stopped_keeps_the_file_whole(tmp_path):
    stopped = gpu.run_part("kernels", "cpu", "tiny", limit=0.2)
    assert stopped["status"] == "stopped after 0 s" and stopped["entries"] == []
    report = tmp_path / "gpu.json"
    before = {"score": {"entries": [1]}, "machine": {}}
    report.write_text(json.dumps({"settings": {"sizes": "tiny"}, "results": before}))
    assert gpu.earlier(report, "tiny") == {"score": {"entries": [1]}}
    assert gpu.earlier(report, "full") == {}
    command = [sys.executable, f"{TOOLS}/benchmark.py", "gpu", "--device", "cpu", "--part", "kernels"]
    done = subprocess.run(
        [*command, "--sizes", "tiny", "--json", str(report)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert results["score"] == {"entries": [1]} and results["kernels"]["status"] == "finished"
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1 and "finds no GPU and nothing can be measured" in done.stderr
