"""`megatron-opd init`: a config to begin with, from a handful of answers or flags, which says why it is so."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_opd.config import load_config
from megatron_opd.data.sources import RowReader, read_rows
from megatron_opd.data.tokenizer import compare_tokenizers, load_tokenizer
from megatron_opd.errors import InputError, describe
from megatron_opd.files import write_whole
from megatron_opd.rollout.limits import positions_of
from megatron_opd.weights.bridge import read_hf_config

GIB = 2**30
# Of a GPU's memory: for the student's training, for the teacher, for the engine. Activations have the rest.
STUDENT_SHARE, TEACHER_SHARE, ENGINE_SHARE = 0.40, 0.15, 0.3


@dataclass(frozen=True)
class Choices:
    """What init is told."""

    student: str
    teacher: str
    prompts: str
    gpus: int = 0  # of a node; 0: none, everything runs on the CPU
    nodes: int = 1
    gpu_gib: float = 80.0
    preset: str = "in_flight"
    run_dir: str = "runs/first"


@dataclass(frozen=True)
class ModelFacts:
    """What a model's folder says of it."""

    folder: str
    parameters: float
    heads: int
    groups: int
    positions: int

    @property
    def size(self) -> str:
        millions = self.parameters / 1e6
        return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.1f}M"


def init(given: dict[str, Any], out: str, force: bool = False, ask: Callable[[str], str] | None = None) -> None:
    """Writes the config to `out` and prints what to do next.

    Args:
        given: what flags say, by the names of `Choices`; None where a flag was left out.
        ask: how to ask for the rest; None: nobody is there to answer.

    Raises InputError where something is missing or cannot be used; nothing is written then.
    """
    path = Path(out)
    if path.exists() and not force:
        raise InputError(f"{out}: is there already; give --force to replace it, or another --out")
    choices = _choices(given, ask)
    text = config_text(choices)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [text])
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {describe(error)}") from error
    load_config(path)  # what was written is a config
    print(f"{out}: written. Next:\n  megatron-opd doctor {out}\n  megatron-opd train {out}")


def _choices(given: dict[str, Any], ask: Callable[[str], str] | None) -> Choices:
    questions = {
        "student": "Student: folder of a Hugging Face model",
        "teacher": "Teacher: folder of a Hugging Face model of the same tokenizer",
        "prompts": "Prompts: a .jsonl or .parquet file, or reasoning_gym:NAME",
        "gpus": "GPUs of a node (0: run on the CPU)",
        "nodes": "Nodes",
    }
    values = {name: value for name, value in given.items() if value is not None}
    open_ones = [name for name in questions if name not in values]
    needed = [name for name in open_ones if name in ("student", "teacher", "prompts")]
    if needed and ask is None:
        raise InputError(f"init: --{needed[0]} is missing: {questions[needed[0]]}")
    if ask is not None and needed:
        for name in open_ones:
            if name == "nodes" and not values.get("gpus"):
                continue
            default = {"gpus": str(_count_gpus()), "nodes": "1"}.get(name, "")
            said = ask(f"{questions[name]}{f' [{default}]' if default else ''}: ").strip() or default
            if name in ("gpus", "nodes"):
                if not said.isdigit():
                    raise InputError(f"init: {name}: {said!r} is no number")
                values[name] = int(said)
            else:
                values[name] = said
    if "gpus" not in values:
        values["gpus"] = _count_gpus()
    return Choices(**values)


def _count_gpus() -> int:
    return torch.cuda.device_count()


def model_facts(key: str, folder: str) -> ModelFacts:
    """Read from config.json and the sizes of the files. Raises InputError."""
    root = Path(os.path.expanduser(folder)).absolute()
    try:
        config = read_hf_config(root)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    files = list(root.glob("*.safetensors")) or list(root.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"{key}: {folder}: has no *.safetensors with parameters")
    bits = 32 if config.dtype == torch.float32 else 16
    parameters = sum(file.stat().st_size for file in files) * 8 / bits
    return ModelFacts(
        str(root), parameters, config.num_attention_heads, config.num_key_value_heads, positions_of(config)
    )


def split(share: float, model: ModelFacts, bytes_each: Callable[[int], float], choices: Choices) -> int:
    """The least tensor-parallel size at which the bytes of a rank are within this share of a GPU; else the largest that
    the model's heads and the node allow."""
    sizes = [t for t in (1, 2, 4, 8) if t <= choices.gpus and model.groups % t == 0 and model.heads % t == 0]
    fits = (t for t in sizes if bytes_each(t) * model.parameters <= share * choices.gpu_gib * GIB)
    return next(fits, sizes[-1])


def config_text(choices: Choices) -> str:
    """The config as YAML with comments. Raises InputError."""
    student, teacher = model_facts("student", choices.student), model_facts("teacher", choices.teacher)
    tokenizer = load_tokenizer(student.folder)
    compare_tokenizers(tokenizer, load_tokenizer(teacher.folder))
    lines = [f"# Made by megatron-opd init, {datetime.date.today()}. `megatron-opd keys WORD` explains any key."]
    lines.append(f"run_dir: {_text(os.path.abspath(choices.run_dir))}")
    if choices.gpus:
        ranks = choices.gpus * choices.nodes
        own = split(STUDENT_SHARE, student, lambda t: (2 + 4) / t + 12 / ranks, choices)
        other = split(TEACHER_SHARE, teacher, lambda t: 2 / t, choices)
        lines += _model(
            "student", student, own, f"{ranks // own} replicas; bf16, fp32 gradients, sharded optimizer state"
        )
        lines += _model("teacher", teacher, other, f"{ranks // other} replicas; bf16")
        if 2 / other * teacher.parameters > TEACHER_SHARE * choices.gpu_gib * GIB:
            lines.append(
                "  offload: true  # in host memory while it does not judge: it would leave too little for the rest"
            )
        engine = [
            f"  vllm: {{tensor: {own}, gpu_memory_utilization: {ENGINE_SHARE}}}  # of each GPU, beside the models"
        ]
        lines += ["rollout:", "  engine: vllm", *engine]
    else:
        lines.insert(2, "device: cpu")
        for key, model in (("student", student), ("teacher", teacher)):
            lines += [f"{key}:", f"  model: {_text(model.folder)}  # {model.size} parameters", "  precision: fp32"]
        lines += ["rollout:", "  engine: megatron"]
    longest = min(student.positions, teacher.positions)
    prompt_tokens = min(1024, longest // 4)
    room = longest - prompt_tokens
    lines += ["prune:", f"  preset: {choices.preset}  # off: plain distillation; paper: the method as published"]
    if room < 12288:
        start = max(1, room // 3)
        step = max(1, start // 4)
        budget = f"{{initial: {start}, minimum: {max(1, start // 2)}, maximum: {room}, step: {step}, margin: {step}}}"
        lines.append(f"  budget: {budget}  # the models have {longest} positions")
    lines += ["train:", "  steps: 203", f"  prompts_per_step: {64 if choices.gpus else 8}", "  responses_per_prompt: 4"]
    lines += ["  lr: 1.0e-6", "  warmup_steps: 5", f"  distributed_optimizer: {str(bool(choices.gpus)).lower()}"]
    lines += ["data:", *_data(choices.prompts, tokenizer.chat_template is not None, prompt_tokens)]
    lines += [
        "eval:",
        "  every: 0  # give eval.sets and how often: docs/reference/config.md",
        "checkpoint:",
        "  every: 20",
    ]
    return "\n".join(lines) + "\n"


def _model(key: str, model: ModelFacts, tensor: int, why: str) -> list[str]:
    parallel = f"{{tensor: {tensor}, sequence: true}}" if tensor > 1 else "{tensor: 1}"
    lines = [
        f"{key}:",
        f"  model: {_text(model.folder)}  # {model.size} parameters",
        f"  parallel: {parallel}  # {why}",
    ]
    return lines


def _data(prompts: str, chats: bool, prompt_tokens: int) -> list[str]:
    named = ":" in prompts  # reasoning_gym:NAME, or one's own
    path = prompts if named else os.path.abspath(os.path.expanduser(prompts))
    lines = [f"  prompts: {_text(path)}"]
    if not named:
        reader = RowReader("prompt", "answer", "source", need_answer=None)
        first = next(read_rows(path), None)
        if first is None:
            raise InputError(f"prompts: {prompts}: is empty")
        for role, read in (("prompt", reader.prompt), ("answer", reader.answer), ("source", reader.source)):
            read(first)
            if reader.column(role) != role:
                lines.append(f"  {role}_key: {reader.column(role)}")
    if not chats:
        lines.append("  template: none  # the student has no chat template")
    lines.append(f"  max_prompt_tokens: {prompt_tokens}  # longer prompts are left out and counted")
    return lines


def _text(value: str) -> str:
    """As YAML takes it for text again."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def from_terminal() -> Callable[[str], str] | None:
    """Asks the person in front of it; None where there is none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None

    def ask(question: str) -> str:
        try:
            return input(question)
        except EOFError:
            raise InputError("init: no answer") from None

    return ask
