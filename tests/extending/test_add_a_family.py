"""The families of docs/extending: logits against transformers in several layouts, training by the command line from a
folder of its own, every way of scoring, and tools/convert.py there and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from megatron_opd.config import ConfigError
from megatron_opd.weights.families import Family, own_family
from tests.distributed import run_distributed
from tests.layouts import teacher_model
from tests.models.test_logits import reference_logits, worst_error
from tests.tiny_run import Case, TinyRun, run_cases

HERE = Path(__file__).parent
OWN = "tests.extending.own_family:"
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not the hidden size over the heads
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def save(folder: Path, kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = kind(config).float()
    for parameter in model.parameters():  # also norms and biases, which transformers starts at 1 and 0
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def make(folder: Path, **changes: object) -> None:
    shape = {**SHAPE, **changes}
    save(folder / "student", MistralForCausalLM, MistralConfig(**shape, sliding_window=None), 0)
    save(folder / "teacher", SeedOssForCausalLM, SeedOssConfig(**shape, attention_bias=True), 1)


def config(folder: Path, module: str) -> TinyRun:
    run = TinyRun(
        folder,
        student={"family": f"{module}:MISTRAL"},
        teacher={"family": f"{module}:SEED_OSS"},
        train={"steps": 2, "warmup_steps": 0},
    )
    make(folder, vocab_size=61)
    return run


def errors(rank: int, world: int, folder: Path) -> list[float | None]:
    """Largest differences of logits from transformers': the whole test of a family."""
    found = []
    for name, family in (("student", "MISTRAL"), ("teacher", "SEED_OSS")):
        reference = reference_logits(folder / name)
        for layout in ("tp1", "tp2_sp", "pp2"):
            found.append(worst_error(teacher_model(folder / name, layout, family=OWN + family), reference))
    return found


def test_the_logits_are_those_of_transformers(tmp_path):
    make(tmp_path)
    for values in zip(*run_distributed(2, errors, tmp_path), strict=True):
        assert max(value for value in values if value is not None) < 1e-4


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(HERE / "own_family.py", folder)
    run = config(folder, "own_family")
    assert run.train(PYTHONPATH=f"{folder}:{HERE.parents[1]}") == 0, run.output()
    return run


def convert(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:{HERE.parents[1]}"
    command = [sys.executable, str(HERE.parents[1] / "tools/convert.py"), *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_a_run_by_the_command_line_ends_in_a_model_that_transformers_loads(by_command):
    folder = by_command.folder
    assert [line["step"] for line in by_command.metrics()] == [1, 2]
    last = by_command.run_dir / "checkpoints/step_000002"
    done = convert(folder, "export", "--megatron", str(last), "--out", "trained", "--family", "own_family:MISTRAL")
    assert done.returncode == 0, done.stdout + done.stderr
    trained = AutoModelForCausalLM.from_pretrained(folder / "trained", local_files_only=True)
    assert isinstance(trained, MistralForCausalLM)
    before, after = load_file(folder / "student/model.safetensors"), load_file(folder / "trained/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved >= {name for name in before if "proj" in name}, "every matrix of the layers was trained"


def test_conversion_there_and_back_changes_nothing(by_command):
    folder, own = by_command.folder, ("--family", "own_family:SEED_OSS")
    for arguments in (
        ("import", "--hf", "teacher", "--out", "converted", "--dtype", "fp32"),
        ("verify", "--hf", "teacher", "--megatron", "converted", "--dtype", "fp32"),
        ("export", "--megatron", "converted", "--out", "back"),
    ):
        done = convert(folder, *arguments, *own)
        assert done.returncode == 0, done.stdout + done.stderr
    before, after = load_file(folder / "teacher/model.safetensors"), load_file(folder / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    refused = convert(folder, "import", "--hf", "teacher", "--out", "other")
    assert refused.returncode != 0 and "student.family: MODULE:NAME" in refused.stderr, "without it, the way is named"


def test_every_way_of_scoring(tmp_path):
    config(tmp_path, "tests.extending.own_family")
    cases = [
        Case("separate"),
        Case("in_flight", ("prune.preset=in_flight", "prune.w_drop=0.2", "prune.segment=4")),
        Case("fused", ("score.mode=fused", "teacher.parallel={tensor: 2, sequence: true}")),
    ]
    for case, outcome in zip(cases, run_distributed(2, run_cases, tmp_path, cases)[0], strict=True):
        assert not outcome.error, outcome.said
        lines = [json.loads(line) for line in (tmp_path / case.name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)


def test_what_would_be_computed_wrongly_is_refused(tmp_path):
    run = config(tmp_path, "tests.extending.own_family")
    path = tmp_path / "student/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 64}))
    assert run.train() == 2
    assert "sliding_window: 64 is not supported for mistral, only None" in run.output()
    assert "Traceback" not in run.output()


unknown = Family(like="gpt2")


@pytest.mark.parametrize("name", [f"{__name__}:unknown", f"{__name__}:SHAPE"])
def test_what_is_no_family_is_refused(name):
    with pytest.raises(ConfigError, match=r"student\.family: .* must be a megatron_opd.weights.families.Family whose"):
        own_family("student.family", name)
