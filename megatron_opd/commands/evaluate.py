"""`megatron-opd eval`: the evaluation of the training loop, on a checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_opd.config import Config, ConfigError
from megatron_opd.data.tokenizer import check_model_vocabulary, load_tokenizer
from megatron_opd.evaluation.run import evaluate, load_eval_sets
from megatron_opd.models.build import build_model, check_layout
from megatron_opd.parallel.groups import student_layout
from megatron_opd.rollout.factory import hf_stream, make_engine
from megatron_opd.rollout.limits import check_lengths
from megatron_opd.runtime.ending import ending
from megatron_opd.training.setup import init_distributed
from megatron_opd.weights.fingerprint import parameters_fingerprint


def evaluate_checkpoint(config: Config, checkpoint: str | None) -> None:
    """Evaluates `checkpoint` (a Hugging Face directory, a converted one or RUN/checkpoints/step_N; None: student.model)
    on every set of `eval.sets`, in the student's layout. Collective.

    Responses and the summary go to RUN/eval/NAME; started again, it goes on where it was interrupted.

    Raises:
        ConfigError: no data sets, no such checkpoint.
    """
    if not config.eval.sets:
        raise ConfigError("eval.sets: is empty; name at least one data set")
    directory = os.path.abspath(checkpoint or config.student.model)
    model_config = config.student.model_copy(update={"model": directory})
    check_layout("student", model_config)
    device = init_distributed(config)
    tokenizer = load_tokenizer(config.data.tokenizer or directory)
    sets = load_eval_sets(config.eval, config.data, tokenizer)
    check_lengths(
        config.model_copy(update={"student": model_config}),
        None,
        [(s.config.name, s.config.max_tokens, s.prompts) for s in sets],
    )
    student = build_model("student", model_config, student_layout(config.student.parallel), device)
    check_model_vocabulary(tokenizer, student.vocab_size, directory)
    engine = make_engine(config.model_copy(update={"student": model_config}), student, set(tokenizer.eos_ids))
    is_writer = dist.get_rank() == 0
    with ending(engine.close):
        engine.update_parameters(lambda: hf_stream(student, config), 0)
        out = Path(config.run_dir, "eval", Path(directory).name)
        parameters = parameters_fingerprint(student, config.rollout.bucket_mb << 20)
        result = evaluate(engine, sets, tokenizer, config.eval, out, 0, is_writer, parameters)
    if is_writer:
        _print(directory, result, out)


def _print(directory: str, result: dict[str, Any], out: Path) -> None:
    table = Table(title=directory)
    columns = ("data set", "prompts", "avg@k", "95% interval", "pass@k", "maj@k", "length", "truncated")
    for name in columns:
        table.add_column(name, justify="left" if name == "data set" else "right")
    for name, numbers in result["sets"].items():
        k = max(int(key.split("@")[1]) for key in numbers if key.startswith("pass@") and key.count("_") == 0)
        table.add_row(
            name,
            f"{numbers['prompts']}",
            f"{100 * numbers[f'avg@{k}']:.2f}%",
            f"{100 * numbers[f'avg@{k}_low']:.2f} to {100 * numbers[f'avg@{k}_high']:.2f}",
            f"{100 * numbers[f'pass@{k}']:.2f}%",
            f"{100 * numbers[f'maj@{k}']:.2f}%",
            f"{numbers['length_mean']:.0f}",
            f"{100 * numbers['truncated']:.1f}%",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for name, notes in result["notes"].items():
        for note in notes:
            print(f"{name}: {note}")
    print(f"responses: {out}")
