"""A tiny run: random models, a character tokenizer, prompts and a config, made in a moment.

run = TinyRun(tmp_path)
run.train("train.steps=4")            a real run through the launcher, 2 processes unless `nproc` says otherwise
run.metrics()                         its metrics.jsonl, without times and memory
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import sentencepiece
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.distributed import LIMIT_S

REPOSITORY = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "device": "cpu",
    "student": {"model": "student", "precision": "fp32", "parallel": {"tensor": 2, "sequence": True}},
    "teacher": {"model": "teacher", "precision": "fp32", "parallel": {"pipeline": 2}},
    "prune": {
        "k": 8,
        "w_drop": 0.05,
        "budget": {"initial": 12, "minimum": 8, "maximum": 24, "step": 4, "margin": 4},
    },
    "train": {
        "steps": 4,
        "prompts_per_step": 2,
        "responses_per_prompt": 2,
        "lr": 1.0e-3,
        "warmup_steps": 2,
        "tokens_per_microbatch": 64,
        "watchdog_s": 900,
    },
    "data": {"prompts": "prompts.jsonl", "template": "none"},
    "checkpoint": {"every": 2},
}


class TinyRun:
    """A folder with models, prompts and `config.yaml`; `changes` are merged into CONFIG."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        tokenizer = _make_tokenizer(folder)
        make_model(folder / "student", tokenizer, seed=0)
        make_model(folder / "teacher", tokenizer, seed=1, hidden_size=48)
        lines = [json.dumps({"prompt": f"{i} + {i + 1} = ", "answer": str(2 * i + 1)}) for i in range(40)]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(_merged(CONFIG, changes)))

    def start(self, *overrides: str, nproc: int = 2, **environment: str) -> subprocess.Popen[str]:
        """Starts `megatron-opd train` in a process group of its own; what it says goes to `output()`."""
        command = [sys.executable, "-m", "megatron_opd.cli", "train", str(self.config), *overrides]
        command += ["--nproc", str(nproc)]
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=child_environment() | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def train(self, *overrides: str, nproc: int = 2, **environment: str) -> int:
        """Runs it to its end and returns the exit code."""
        return self.wait(self.start(*overrides, nproc=nproc, **environment))

    def wait(self, process: subprocess.Popen[str]) -> int:
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"still running after {LIMIT_S} s:\n{self.output()}") from None

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def metrics(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        """One dict a step, without times. Every key must stand in the documentation, whatever run writes it."""
        steps = [json.loads(line) for line in ((run_dir or self.run_dir) / "metrics.jsonl").read_text().splitlines()]
        unknown = {key for step in steps for key in step} - documented()
        assert not unknown, f"no page of docs/ says what these metrics are: {sorted(unknown)}"
        return [{k: v for k, v in step.items() if not k.endswith(("_s", "_gib"))} for step in steps]

    def steps_logged(self) -> int:
        try:
            return len((self.run_dir / "metrics.jsonl").read_text().splitlines())
        except FileNotFoundError:
            return 0


@functools.cache
def documented() -> set[str]:
    """What stands between backticks on the pages of docs/."""
    pages = (Path(__file__).parents[1] / "docs").rglob("*.md")
    return {name for page in pages for name in re.findall(r"`(\w+)`", page.read_text(encoding="utf-8"))}


@dataclass(frozen=True)
class Case:
    """One run of several that share their processes."""

    name: str  # of its run_dir
    overrides: tuple[str, ...] = ()  # FOLDER stands for the TinyRun's
    resumes: tuple[str, int] | None = None  # from a copy of that run_dir's checkpoint of that step
    prepare: Callable[[Path], object] | None = None  # rank 0 calls it with the run_dir, before the run
    before_step: Callable[[int, int], object] | None = None  # every rank calls it with its number and the step's


@dataclass(frozen=True)
class Outcome:
    """How a case ended on one rank."""

    error: str  # "Type: message", or empty
    exit_code: int  # that the command line would have ended with
    said: str


def run_cases(rank: int, world: int, folder: Path, cases: list[Case]) -> list[Outcome]:
    """Trains one case after the other; for `tests.distributed.run_distributed`."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_opd.config import load_config
    from megatron_opd.training import loop

    outcomes = []
    plain_step = loop.step
    for case in cases:
        run_dir = folder / case.name
        if rank == 0:
            if case.resumes:
                name, step = case.resumes
                checkpoint = f"checkpoints/step_{step:06d}"
                shutil.copytree(folder / name / checkpoint, run_dir / checkpoint, dirs_exist_ok=True)
                if not (run_dir / "metrics.jsonl").exists():
                    shutil.copy(folder / name / "metrics.jsonl", run_dir / "metrics.jsonl")
            if case.prepare:
                case.prepare(run_dir)
        dist.barrier()

        def step(run: Any, case: Case = case) -> dict[str, Any]:
            if case.before_step:
                case.before_step(rank, run.step + 1)
            return plain_step(run)

        loop.step = step
        said, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(said):
                overrides = [text.replace("FOLDER", str(folder)) for text in case.overrides]
                loop.train(load_config(folder / "config.yaml", [f"run_dir={run_dir}", *overrides]))
        except Exception as caught:
            error = caught
        finally:
            loop.step = plain_step
            parallel_state.destroy_model_parallel()
        text = f"{type(error).__name__}: {error}" if error else ""
        outcomes.append(Outcome(text, getattr(error, "exit_code", 1) if error else 0, said.getvalue()))
        dist.barrier()
    return outcomes


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher and all ranks, which torchrun has put into sessions of their own."""
    launcher = psutil.Process(process.pid)
    everything = [launcher, *launcher.children(recursive=True)]
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everything)


def child_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launched and not k.startswith("TORCHELASTIC")}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }


def _make_tokenizer(folder: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog 0123456789 + - = ."] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="char",
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def make_model(folder: Path, tokenizer: Path, seed: int, **changes: int) -> None:
    """A random Qwen3 with its tokenizer; `changes` to its shape."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 61,  # odd: tensor ranks pad it
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}, tie_word_embeddings=True)).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)  # sharp distributions: teacher and student disagree at some positions
    model.save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = _merged(result[key], value) if isinstance(result.get(key), dict) else value
    return result
