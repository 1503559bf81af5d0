"""`init` writes a config that `doctor` accepts; `slurm write`, completion, and an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd.commands.init import Choices, ModelFacts, config_text, init, split
from megatron_opd.config import load_config
from megatron_opd.errors import InputError
from tests.tiny_run import REPOSITORY, TinyRun, child_environment

EXAMPLE = REPOSITORY / "examples" / "tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("init"))


def flags(tiny: TinyRun, **more: Any) -> dict[str, Any]:
    folder = tiny.folder
    given = {"student": folder / "student", "teacher": folder / "teacher", "prompts": folder / "prompts.jsonl"}
    return {name: str(path) for name, path in given.items()} | more


def opd(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_opd.cli", *arguments]
    env = child_environment() | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=900)


def test_doctor_and_train_accept_what_init_writes(tiny: TinyRun, tmp_path: Path) -> None:
    given = flags(tiny)
    words = [f"--{name}={value}" for name, value in given.items()]
    done = opd("init", *words, "--gpus=0", "--run-dir=run", folder=tmp_path)
    assert done.returncode == 0 and "megatron-opd doctor config.yaml" in done.stdout, done.stderr
    done = opd("doctor", "config.yaml", folder=tmp_path)
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout
    done = opd("train", "config.yaml", "train.steps=1", "train.warmup_steps=0", "prune.k=4", folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "metrics.jsonl").exists(), done.stderr
    assert "# " in (tmp_path / "config.yaml").read_text()


def test_it_asks_for_what_no_flag_says(tiny: TinyRun, tmp_path: Path) -> None:
    given, asked = flags(tiny), []

    def answer(question: str) -> str:
        asked.append(question)
        return next((value for name, value in given.items() if question.lower().startswith(name)), "0")

    init({"preset": "paper"}, str(tmp_path / "c.yaml"), ask=answer)
    config = load_config(tmp_path / "c.yaml")
    assert config.prune.preset == "paper" and config.student.model == given["student"] and config.device == "cpu"
    assert len(asked) == 4 and all("[" not in q or q.startswith("GPUs") for q in asked)


def test_what_is_missing_is_said_where_nobody_can_be_asked(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--teacher is missing"):
        init({"student": str(tiny.folder / "student")}, str(tmp_path / "c.yaml"))
    init(flags(tiny, gpus=0), str(tmp_path / "c.yaml"))
    with pytest.raises(InputError, match="give --force to replace it"):
        init(flags(tiny, gpus=0), str(tmp_path / "c.yaml"))
    init(flags(tiny, gpus=0), str(tmp_path / "c.yaml"), force=True)


def test_columns_and_templates_are_found(tiny: TinyRun, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"problem": ["1+1?"], "final_answer": ["2"], "data_source": ["sums"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    data = yaml.safe_load(config_text(Choices(**flags(tiny, prompts=str(tmp_path / "p.parquet")))))["data"]
    assert (data["prompt_key"], data["answer_key"], data["source_key"]) == ("problem", "final_answer", "data_source")
    assert data["template"] == "none"  # a tokenizer without a chat template
    gym = yaml.safe_load(config_text(Choices(**flags(tiny, prompts="reasoning_gym:chain_sum"))))["data"]
    assert gym["prompts"] == "reasoning_gym:chain_sum" and "prompt_key" not in gym


def facts(billions: float, groups: int = 8) -> ModelFacts:
    return ModelFacts("/m", billions * 1e9, 32, groups, 32768)


@pytest.mark.parametrize(
    ("billions", "gpus", "nodes", "tensor"), [(0.6, 8, 1, 1), (1.7, 8, 1, 1), (4, 8, 1, 1), (8, 8, 2, 2), (32, 8, 8, 8)]
)
def test_tensor_sizes_grow_with_the_model(billions: float, gpus: int, nodes: int, tensor: int) -> None:
    """bf16 parameters, fp32 gradients and 12 bytes of optimizer state over all ranks, in 40% of 80 GB."""
    choices = Choices("s", "t", "p", gpus, nodes)
    assert split(0.40, facts(billions), lambda t: 6 / t + 12 / (gpus * nodes), choices) == tensor


def test_heads_bound_the_tensor_size() -> None:
    assert split(0.1, facts(70, groups=2), lambda t: 2 / t, Choices("s", "t", "p", 8)) == 2


def test_a_teacher_that_is_too_large_is_offloaded(tiny: TinyRun) -> None:
    text = config_text(Choices(**flags(tiny, gpus=1, gpu_gib=1e-6)))
    config = yaml.safe_load(text)
    assert config["teacher"]["offload"] is True and config["rollout"]["engine"] == "vllm"
    assert "offload" not in yaml.safe_load(config_text(Choices(**flags(tiny, gpus=8))))["teacher"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "nowhere"}, "student: .*nowhere/config.json: No such file or directory"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"teacher": "torn"}, "teacher: .*torn/config.json: not valid JSON"),
        ({"teacher": "strange"}, "model_type 'gpt2'.; supported model types: llama"),
        ({"teacher": "empty"}, "has no \\*.safetensors"),
        ({"teacher": "other"}, "the tokenizers of student .* differ"),
        ({"prompts": "bare.jsonl"}, "bare.jsonl: is empty"),
        ({"prompts": "odd.jsonl"}, "odd.jsonl: line 1: .*prompt"),
        ({"prompts": "list.jsonl"}, "list.jsonl: line 1"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_written(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = json.loads((tiny.folder / "teacher" / "config.json").read_text())
    for name, text in {
        "torn": "{",
        "strange": json.dumps(model | {"model_type": "gpt2"}),
        "empty": json.dumps(model),
    }.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    shutil.copytree(tiny.folder / "teacher", "other")
    (Path("other") / "tokenizer.model").write_bytes((EXAMPLE / "models" / "teacher" / "tokenizer.model").read_bytes())
    for name, text in {"bare": "\n", "odd": '{"text": "a"}', "list": "[1]"}.items():
        Path(f"{name}.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        init(flags(tiny, gpus=0) | change, "config.yaml")
    assert not Path("config.yaml").exists()


def test_the_shell_completes_commands_flags_and_keys(tmp_path: Path) -> None:
    def completed(line: str) -> set[str]:
        said = tmp_path / "said"
        environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        done = opd("x", folder=tmp_path, _ARGCOMPLETE_STDOUT_FILENAME=str(said), **environment)
        assert done.returncode == 0, done.stderr
        return set(said.read_text().split("\n"))

    assert {"report ", "runs "} <= {f"{word.strip()} " for word in completed("megatron-opd r")}
    assert "--step" in {word.strip() for word in completed("megatron-opd show --s")}
    assert "prune.preset=" in {word.strip() for word in completed("megatron-opd train c.yaml prune.p")}


def test_a_wheel_brings_what_the_commands_need(tmp_path: Path) -> None:
    """Built from a copy, installed apart, and run outside the repository."""
    source = tmp_path / "source"
    for name in ("megatron_opd", "slurm", "examples/qwen3"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    away = tmp_path / "away"
    away.mkdir()
    only = {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import megatron_opd; print(megatron_opd.__file__)"],
        capture_output=True,
        text=True,
        cwd=away,
        env=child_environment() | only,
    )
    assert where.stdout.startswith(str(site))
    assert opd("slurm", "write", "jobs", folder=away, **only).returncode == 0
    for name in ("slurm/train_qwen3.sh", "slurm/lib.sh", "slurm/launch.py", "examples/qwen3/recipe.yaml"):
        assert (away / "jobs" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert os.access(away / "jobs" / "slurm" / "train_qwen3.sh", os.X_OK)
    again = opd("slurm", "write", "jobs", folder=away, **only)
    assert again.returncode == 2 and "give --force" in again.stderr
    from tests.report.runs import make_run

    make_run(away / "run", 2)
    assert opd("report", "run", folder=away, **only).returncode == 0 and (away / "run" / "report.html").exists()
    assert opd("keys", "preset", folder=away, **only).returncode == 0
