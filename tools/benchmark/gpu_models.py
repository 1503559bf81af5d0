"""`gpu` parts train and score: tokens per second of students' training and of teachers' scoring, in bf16 and FP8."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmark.gpu_common import Bench, K, Report, forward_flops, mean_context, write_model
from benchmark.step import random_batch
from megatron_opd.config import Config, ModelConfig, parse_config
from megatron_opd.models.build import build_model
from megatron_opd.models.model import Model
from megatron_opd.parallel.groups import Layout, student_layout, teacher_layout
from megatron_opd.prune.signals import make_signal
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.training.microbatch import kept_tokens
from megatron_opd.training.setup import Trainer, build_optimizer, build_scheduler, init_distributed, wrap_ddp
from megatron_opd.training.step import TrainingStep
from megatron_opd.weights.parameters import fill

REPEATS = 5  # steps, or scoring passes, whose median counts

# Keys of a model's config. The first two are compared, so both must fit; the others are measured beside them.
COMPARED = {"FP8 tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"}, "bf16": {}}
BESIDE = {
    "FP8 blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "FP8 tensorwise, FP8 parameters": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_params": True},
    "bf16, local layers": {"implementation": "local"},
}


class NoOptimizer:
    """Stands in where the optimizer's state does not fit: the step is forward and backward alone."""

    param_groups: list[dict[str, Any]] = []

    def zero_grad(self) -> None:
        pass

    def prepare_grads(self) -> bool:
        return False

    def get_grad_norm(self) -> float:
        return 0.0

    def step(self, increment: int = 1) -> None:
        """Also the learning rate scheduler's."""


def random_model(name: str, settings: ModelConfig, layout: Layout, device: torch.device) -> Model:
    """A model with random parameters, made where it is needed: no weights are read."""
    model = build_model(name, settings, layout, device, load=False)
    source = torch.Generator(device).manual_seed(0 if name == "student" else 1)
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter_name, parameter in chunk.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
                    continue
                dtype = model.config.params_dtype
                values = torch.randn(parameter.shape, generator=source, device=device, dtype=torch.float32) * 0.02
                fill(parameter, values.to(dtype))
    return model


def config_of(bench: Bench, student: Path, teacher: Path, changes: dict[str, Any], **sections: Any) -> Config:
    """One GPU, bf16, and a model's `changes` on both sides."""
    side = {"precision": "bf16"} | changes
    distributed = {"distributed_optimizer": bool(changes.get("fp8_params"))}
    return parse_config(
        {
            "device": bench.kind,
            "student": {"model": str(student)} | side,
            "teacher": {"model": str(teacher)} | side,
            "prune": {"k": K},
            "data": {"prompts": "none.jsonl"},
        }
        | sections
        | {"train": {"steps": 10**6, "lr": 1e-6} | distributed | sections.get("train", {})}
    )


def train(bench: Bench, report: Report) -> None:
    """Whole training steps (micro-batches, forward, backward, optimizer) of each student."""
    report.add(what="peak", bf16_matmul_tflops=bench.matmul_rate() / 1e12, data_sheet_flops=list(bench.peaks()))
    for name in bench.sizes["train"]:
        for setting in bench.sizes["train_settings"]:
            if all(_trained(bench, report, name, label, changes, setting) for label, changes in COMPARED.items()):
                for label, changes in BESIDE.items():
                    _trained(bench, report, name, label, changes, setting)
                break


def _trained(bench: Bench, report: Report, name: str, label: str, changes: dict[str, Any], setting: list[Any]) -> bool:
    """Measures one precision of one model; whether it fitted, or failed for another reason than memory."""
    tokens, recompute, fused_head, optimizer = setting
    what = {"model": name, "precision": label, "microbatch": tokens, "recompute": recompute, "fused_head": fused_head}
    before = len(report.entries)
    with report.attempt(bench, **what, optimizer=optimizer):
        report.add(**what, optimizer=optimizer, **_training(bench, name, changes | {"recompute": recompute}, setting))
    return "OutOfMemory" not in report.entries[before].get("error", "")


def _training(bench: Bench, name: str, changes: dict[str, Any], setting: list[Any]) -> dict[str, Any]:
    microbatch, _, fused_head, with_optimizer = setting
    sizes = bench.sizes
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder), name)
        sections = {"train": {"tokens_per_microbatch": microbatch}, "loss": {"fused_head": fused_head}}
        config = config_of(bench, directory, directory, changes, **sections)
        device = init_distributed(config)
        student = random_model("student", config.student, student_layout(config.student.parallel), device)
    ddp = wrap_ddp(student, config.train)
    optimizer: Any = build_optimizer(student, ddp, config.train) if with_optimizer else NoOptimizer()
    scheduler: Any = build_scheduler(optimizer, config.train) if with_optimizer else NoOptimizer()
    step = TrainingStep(Trainer(student, {"teacher": student}, ddp, optimizer, scheduler), config)
    batch = random_batch(sizes["train_responses"], sizes["train_tokens"], 1.0, student.vocab_size, K)
    lengths = kept_tokens(batch)
    losses = []
    peak = bench.peak_bytes(lambda: losses.append(step(batch).loss))
    seconds = bench.seconds(lambda: losses.append(step(batch).loss), REPEATS, warmup=1)
    rate = sum(lengths) / seconds["median"]
    flops = 3 * forward_flops(name, sum(lengths), mean_context(lengths)) / seconds["median"]
    return {
        "tokens_per_s": rate,
        "tflops": flops / 1e12,
        "mfu_of_bf16_peak": flops / bench.peaks()[0] if bench.peaks()[0] else None,
        "seconds": seconds["median"],
        "peak_bytes": peak,
        "loss": losses[-1],
        "spread": seconds,
    }


def score(bench: Bench, report: Report) -> None:
    """The teacher's pass over whole responses."""
    for name in bench.sizes["score"]:
        for label, changes in (COMPARED | BESIDE).items():
            with report.attempt(bench, model=name, precision=label):
                report.add(model=name, precision=label, **_scoring(bench, name, changes))


def _scoring(bench: Bench, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    sizes = bench.sizes
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder), name)
        config = config_of(bench, directory, directory, changes)
        device = init_distributed(config)
        student_layout(config.student.parallel)  # Megatron-Core's layers ask its global groups, too
        teacher = random_model("teacher", config.teacher, teacher_layout(config.teacher.parallel), device)
    for chunk in teacher.chunks:
        chunk.requires_grad_(False)
    held = torch.cuda.memory_allocated() if bench.kind == "cuda" else 0
    batch = random_batch(sizes["score_responses"], sizes["score_tokens"], 1.0, teacher.vocab_size, K)
    lengths = kept_tokens(batch)

    def work() -> None:
        score_rollouts(teacher, batch.rollouts, make_signal(config.prune), sizes["score_microbatch"])

    peak = bench.peak_bytes(work)
    seconds = bench.seconds(work, REPEATS, warmup=1)
    flops = forward_flops(name, sum(lengths), mean_context(lengths)) / seconds["median"]
    return {
        "tokens_per_s": sum(lengths) / seconds["median"],
        "tflops": flops / 1e12,
        "mfu_of_bf16_peak": flops / bench.peaks()[0] if bench.peaks()[0] else None,
        "seconds": seconds["median"],
        "parameter_bytes": held,
        "peak_bytes": peak,
        "spread": seconds,
    }
