"""`gpu` parts steps and fp8: whole Prune-OPD steps with the Megatron engine; what FP8 does to a run and to drift."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.common import REPOSITORY, summary
from benchmark.gpu_common import Bench, K, Report, write_model
from benchmark.gpu_models import config_of, random_model
from megatron_opd.commands.precision_shift import Changes, fp8_changes, measure
from megatron_opd.config import Config, load_config
from megatron_opd.records.lines import read_steps
from megatron_opd.training import loop, setup
from megatron_opd.training.clock import PHASE_KEYS
from megatron_opd.training.run import Run, load_tokenizers
from megatron_opd.training.setup import init_distributed

EXAMPLE = REPOSITORY / "examples" / "tiny"
PRESETS = ("off", "paper", "in_flight")


@contextmanager
def random_weights() -> Iterator[None]:
    """Runs built inside have models with random parameters instead of those of their directories."""
    original = setup.build_model
    setup.build_model = random_model  # type: ignore[assignment]
    try:
        yield
    finally:
        setup.build_model = original


def steps(bench: Bench, report: Report) -> None:
    """Whole steps, each preset by itself. Random models disagree everywhere, so every token of theirs is an event:
    w_drop is set so that reliability is spent half-way through the budget."""
    for preset in PRESETS:
        with report.attempt(bench, preset=preset), tempfile.TemporaryDirectory() as folder:
            report.add(preset=preset, **_whole_steps(bench, Path(folder), preset))


def _whole_steps(bench: Bench, folder: Path, preset: str) -> dict[str, Any]:
    sizes = bench.sizes
    directories = [write_model(folder / who, sizes[who]) for who in ("student", "teacher")]
    for directory in directories:
        shutil.copy(EXAMPLE / "models" / "teacher" / "tokenizer.model", directory)
    prune: dict[str, Any] = {"preset": preset, "k": K, "segment": sizes["segment"]}
    prune["budget"] = {key: sizes["budget"] for key in ("initial", "minimum", "maximum")}
    if preset != "off":
        prune["w_drop"] = 2 / sizes["budget"]
    prompts = EXAMPLE / "prompts" / "train.jsonl"
    responses = {"prompts_per_step": sizes["prompts"], "responses_per_prompt": sizes["responses"]}
    config = config_of(
        bench,
        *directories,
        {},
        run_dir=str(folder / "run"),
        prune=prune,
        data={"prompts": str(prompts), "template": "none"},
        eval={"every": 0, "at_end": False},
        checkpoint={"every": 0},
        train=responses,
    )
    with random_weights():
        run = Run(config)
    try:
        loop.step(run)  # buffers, kernels and the optimizer's state are made
        metrics = [loop.step(run) for _ in range(sizes["steps"])]
    finally:
        run.close()
    seconds = summary([m["step_s"] for m in metrics])
    middle = {phase: summary([m[phase] for m in metrics])["median"] for phase in PHASE_KEYS}
    tokens = summary([m["tokens_generated"] for m in metrics])["median"]
    return {
        "seconds": seconds["median"],
        "tokens_generated": tokens,
        "tokens_trained": summary([m["tokens_trained"] for m in metrics])["median"],
        "tokens_per_s": tokens / seconds["median"],
        **{f"{phase.removesuffix('_s')}_share": value / seconds["median"] for phase, value in middle.items()},
        "spread": seconds,
    }


def fp8(bench: Bench, report: Report) -> None:
    """On the embedded example, whose models are trained: the shift of overlap and events, and a run's loss curve."""
    sizes = bench.sizes
    asked = [f"train.prompts_per_step={sizes['shift_prompts']}", *_budget(sizes["shift_tokens"])]
    for pair in ("close", "drifting"):
        for recipe in ("tensorwise", "blockwise") if bench.kind == "cuda" else ("tensorwise",):
            with report.attempt(bench, what="shift", pair=pair, recipe=recipe), tempfile.TemporaryDirectory() as folder:
                config = _example(bench, pair, Path(folder), *asked)
                device, (tokenizer, _) = init_distributed(config), load_tokenizers(config)
                shift = measure(config, tokenizer, device, *_ways(bench, config, recipe))
                for row in shift.combinations:
                    report.add(
                        what="shift",
                        pair=pair,
                        recipe=recipe,
                        student=row.student,
                        teacher=row.teacher,
                        overlap=row.overlap,
                        changed=row.changed,
                        event_rate=row.event_rate,
                        flipped=row.flipped,
                        effective_length=row.effective_length,
                    )
                supported = ", ".join(f"{t:g}" for t in shift.supported())
                report.add(what="shift", pair=pair, recipe=recipe, supported=supported, self_overlap=shift.self_overlap)
    curves: dict[str, list[float]] = {}
    for label, changes in _curve_ways(bench).items():
        with report.attempt(bench, what="curve", precision=label), tempfile.TemporaryDirectory() as folder:
            entry = _curve(bench, Path(folder), changes)
            curves[label] = entry["loss"]
            report.add(what="curve", precision=label, **entry)
    labels = list(curves)
    for label in labels[1:]:
        pairs = list(zip(curves[labels[0]], curves[label]))
        tail = pairs[-max(1, len(pairs) // 5) :]
        first, other = (sum(values) / len(tail) for values in zip(*tail))
        report.add(what="curves", precision=label, last_fifth=other, last_fifth_of_first=first)


def _ways(bench: Bench, config: Config, recipe: str) -> tuple[tuple[str, str], dict[str, tuple[Changes, Changes]]]:
    """bf16 and FP8; on a CPU, to run the script, fp32 and bf16."""
    if bench.kind == "cpu":
        both = ({"precision": "fp32"}, {"precision": "bf16"})
        return ("fp32", "bf16"), {"student": both, "teacher": both}
    ways = {}
    for who, settings in (("student", config.student), ("teacher", config.teacher)):
        plain, other = fp8_changes(settings)
        ways[who] = (plain, {**other, "fp8_recipe": recipe})
    return ("bf16", f"FP8 {recipe}"), ways


def _curve_ways(bench: Bench) -> dict[str, list[str]]:
    """Overrides of the runs whose losses are compared; the first is the plain one."""
    if bench.kind == "cpu":
        return {"fp32": [], "bf16": ["student.precision=bf16"]}
    both = ["student.precision=bf16", "teacher.precision=bf16"]
    return {
        "bf16": both,
        "FP8 student": [*both, "student.fp8=hybrid"],
        "FP8 student and teacher": [*both, "student.fp8=hybrid", "teacher.fp8=hybrid"],
    }


def _curve(bench: Bench, folder: Path, changes: list[str]) -> dict[str, Any]:
    """Loss, reverse KL and overlap of each step of a real run, and its accuracy afterwards (with reasoning-gym, which
    judges the responses)."""
    steps, tokens = bench.sizes["curve_steps"], bench.sizes["curve_tokens"]
    judged = importlib.util.find_spec("reasoning_gym") is not None
    limits = [f"train.steps={steps}", "eval.every=0"]
    responses = [f"eval.sets.0.limit={bench.sizes['curve_responses']}", f"eval.sets.0.max_tokens={2 * tokens}"]
    limits += responses if judged else ["eval.sets=[]"]
    loop.train(_example(bench, "drifting", folder, *changes, *_budget(tokens), *limits))
    lines = read_steps(folder / "run" / "metrics.jsonl")
    found: dict[str, Any] = {
        key: [line[name] for line in lines]
        for key, name in (("loss", "loss"), ("reverse_kl", "reverse_kl"), ("overlap", "overlap_mean"))
    }
    accuracy = next(iter(lines[-1]["accuracy"].values())) if judged else None
    return found | {"accuracy": accuracy, "steps": steps}


def _budget(tokens: int) -> list[str]:
    return [f"prune.budget.{key}={tokens}" for key in ("initial", "minimum", "maximum")]


def _example(bench: Bench, pair: str, folder: Path, *changes: str) -> Config:
    """A config of the embedded example, on one process of this device."""
    plain = ["student.parallel={}", "teacher.parallel={}", f"device={bench.kind}", f"run_dir={folder / 'run'}"]
    return load_config(EXAMPLE / f"{pair}.yaml", [*plain], [*changes])
