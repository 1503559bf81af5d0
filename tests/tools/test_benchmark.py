"""Each benchmark runs, at sizes that say nothing about speed, and reports what can be known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distributed import LIMIT_S
from tests.tiny_run import REPOSITORY, TinyRun, child_environment

sys.path.insert(0, str(REPOSITORY / "tools"))
from benchmark.common import growth_exponent, summary  # noqa: E402
from benchmark.methods import accuracy_at  # noqa: E402

ONE_PROCESS = ("student.parallel.tensor=1", "student.parallel.sequence=false", "teacher.parallel.pipeline=1")


def benchmark(folder, *arguments):
    """Runs it and returns its report and what it printed."""
    report = folder / "report.json"
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), arguments[0], "--json", str(report)]
    done = subprocess.run(
        [*command, "--device", "cpu", *map(str, arguments[1:])],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["benchmark"] == arguments[0] and found["date"] and "gloo" in found["device"]
    assert found["versions"]["torch"] and arguments[0] in found["command"]
    return found["results"], done.stdout


def test_growth_exponents_and_spread():
    assert growth_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth_exponent([1, 2], [8, 4]) == pytest.approx(-1)
    found = summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found["median"] == 3 and found["low"] < 2.1 and found["high"] > 3.9


def test_overlap_is_the_same_and_sends_less(tmp_path):
    tokens, k = 32, 4
    sizes = ("--tp", 2, "--tokens", tokens, "--vocab", 1024, "--k", k, "--dtype", "fp32", "--repeats", 2)
    results, printed = benchmark(tmp_path, "overlap", *sizes, "--gather-tokens", 16)
    found = results["tp2"]
    assert found["difference_to_candidates"] == 0
    assert found["candidates"]["bytes_sent"] == 2 * tokens * k * (4 + 8)  # values and ids of two models to one other
    assert found["logits"]["bytes_sent"] == 2 * tokens * 512 * 4
    assert found["ours"]["bytes_sent"] < found["candidates"]["bytes_sent"]
    assert len(found["ours"]["seconds"]["values"]) == 2 and len(found["logits"]["seconds"]["values"]) == 2
    assert "topk_overlap" in printed and "bytes sent" in printed


def test_step_reports_shares_and_idle_time(tmp_path):
    sizes = ("--answers", 4, "--tokens", 32, "--layers", 2, "--hidden", 64, "--microbatch", 96, "--repeats", 1)
    results, printed = benchmark(tmp_path, "step", "--layouts", "pp2", "--shares", 100, 25, *sizes)
    full, quarter = results["pp2"]
    assert full["of_full"] == full["efficiency"] == 1 and quarter["share"] == 25
    assert quarter["efficiency"] == pytest.approx(4 * quarter["of_full"])
    assert 0 < quarter["bubble"] < 1 and quarter["microbatches"] <= full["microbatches"]
    assert "efficiency" in printed


def test_scaling_gives_an_exponent_for_each_axis(tmp_path):
    sizes = ("--answers", 2, "--tokens", 16, "--layers", 1, "--hidden", 64, "--doublings", 1, "--repeats", 1)
    results, _ = benchmark(tmp_path, "scaling", *sizes, "--ranks", 1)
    assert results["layers"]["sizes"] == [1, 2] and results["sequence length"]["sizes"] == [16, 32]
    assert all(isinstance(results[axis]["exponent"], float) for axis in ("layers", "sequence length", "batch"))


def test_rollout_counts_tokens_per_second(tmp_path):
    sizes = ("--batches", 1, 2, "--tokens", 4, "--layers", 1, "--hidden", 64, "--repeats", 1, "--processes", 1)
    results, _ = benchmark(tmp_path, "rollout", "--engines", "megatron", *sizes)
    assert [r["batch"] for r in results] == [1, 2]
    assert all(r["tokens_per_second"]["median"] > 0 for r in results)


def test_prune_compares_methods_and_draws(tmp_path):
    sizes = ("--pairs", "drifting", "--methods", "off", "in_flight", "--seeds", 1, "--processes", 1, "--out", "out")
    changes = ("train.steps=1", "train.prompts_per_step=2", "eval.sets.0.limit=2", "eval.sets.0.max_tokens=4")
    budget = [f"prune.budget.{key}=16" for key in ("initial", "minimum", "maximum")]
    results, printed = benchmark(tmp_path, "prune", *sizes, *changes, *budget, *ONE_PROCESS)
    assert [e["method"] for e in results["summary"]] == ["off", "in_flight"]
    assert all(r["tokens_generated"] >= r["tokens_trained"] > 0 and r["seconds"] > 0 for r in results["runs"])
    assert results["runs"][0]["curve"][0][0] == 0  # the accuracy before training
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 1000
    assert "time to accuracy" in printed


def test_methods_are_compared_at_equal_steps_and_at_equal_trained_tokens(tmp_path):
    sizes = ("--pairs", "drifting", "--methods", "off", "topd", "tip", "--seeds", 1, "--processes", 1, "--out", "out")
    changes = ("train.steps=2", "train.prompts_per_step=2", "eval.sets.0.limit=2", "eval.sets.0.max_tokens=4")
    changes = (
        *changes,
        "eval.every=1",
        "prune.budget.maximum=16",
        *(f"prune.budget.{k}=16" for k in ("initial", "minimum")),
    )
    results, printed = benchmark(tmp_path, "methods", *sizes, *changes, *ONE_PROCESS)
    off, topd, tip = results["summary"]
    assert [off["method"], topd["method"], tip["method"]] == ["off", "topd", "tip"]
    assert topd["tokens_generated"] <= 2 * 6 * 4  # a quarter of 16 tokens, six responses, two steps
    assert off["tokens_generated"] == tip["tokens_generated"] >= tip["tokens_trained"]
    least = min(e["tokens_trained"] for e in results["summary"])
    assert {e["equal_trained_tokens"] for e in results["summary"]} == {least}
    assert "at equal trained tokens" in printed


@pytest.mark.parametrize("tokens, accuracy", [(50, 0.2), (100, 0.2), (150, 0.3), (200, 0.4), (900, 0.4)])
def test_accuracy_between_two_evaluations(tokens, accuracy):
    assert accuracy_at([(100, 0.2), (200, 0.4)], tokens) == pytest.approx(accuracy)


def test_checkpoint_saves_in_both_ways_and_loads_again(tmp_path):
    sizes = ("--answers", 2, "--tokens", 16, "--repeats", 1, "--folder", tmp_path)
    results, printed = benchmark(tmp_path, "checkpoint", *sizes)
    assert results["asynchronous"]["steps_beside"][0] >= 1 and results["synchronous"]["steps_beside"] == [0]
    assert 0 < results["asynchronous"]["copy_s"]["median"] <= results["asynchronous"]["stall_s"]["median"]
    assert results["size_bytes"] > 2.9 * results["model_bytes"] > 0  # fp32: Adam's two moments beside the parameters
    assert results["load_s"] > 0 and "training waits" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(
    not (REPOSITORY / ".venv-trl").exists(), reason="no .venv-trl: `benchmark.py train` makes it, which needs a network"
)
def test_train_runs_beside_trl(tmp_path):
    run = TinyRun(tmp_path)
    places = ("--student", run.folder / "student", "--teacher", run.folder / "teacher", "--prompts", "prompts.jsonl")
    sizes = ("--prompts-per-step", 2, "--tokens", 4, "--repeats", 1, "--warmup", 0, "--processes", 1)
    results, printed = benchmark(tmp_path, "train", *places, *sizes, "--presets", "off")
    assert 0 < results["trl"]["tokens"]["median"] <= 16 and 0 < results["off"]["tokens"]["median"] <= 16
    assert results["trl"]["token_speed_of_trl"] == 1 and results["off"]["token_speed_of_trl"] > 0
    assert "DistillationTrainer" in printed
