"""One run: everything that `loop.train` works with, built once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_opd.checkpoint.checkpointer import Checkpointer
from megatron_opd.config import Config, ConfigError
from megatron_opd.data.loader import PromptLoader
from megatron_opd.data.prompts import PromptSet, load_prompts
from megatron_opd.data.tokenizer import Tokenizer, check_model_vocabulary, compare_tokenizers, load_tokenizer
from megatron_opd.errors import InputError, describe
from megatron_opd.evaluation.run import EvalSet, evaluate, load_eval_sets
from megatron_opd.parallel.collective import on_rank_0, together
from megatron_opd.prune import ResponseBudget, StaircaseBudget
from megatron_opd.prune.signals import make_signal
from megatron_opd.prune.token_weighting import make_token_weighting
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling
from megatron_opd.rollout.carry_over import CarryOver
from megatron_opd.rollout.factory import check_engine, hf_stream, make_engine
from megatron_opd.rollout.limits import check_lengths
from megatron_opd.runtime.guard import Guard
from megatron_opd.scoring.factory import make_scoring
from megatron_opd.scoring.response_weights import TeacherShares
from megatron_opd.scoring.targets import make_targets
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.training.alarms import AlarmWatch
from megatron_opd.training.bad_steps import dump_bad_step
from megatron_opd.training.metrics import teacher_metrics
from megatron_opd.training.metrics_log import add_warning, was_reported
from megatron_opd.training.objective import build_loss
from megatron_opd.training.probe import HandoverProbe
from megatron_opd.training.progress import StepProgress
from megatron_opd.training.rewards import PastDriftRewards
from megatron_opd.training.run_files import RunFiles, check_trackers
from megatron_opd.training.setup import Trainer, build_trainer, init_distributed
from megatron_opd.training.step import TrainingStep
from megatron_opd.training.stop import resolve_stop
from megatron_opd.training.watched import watch_step
from megatron_opd.types import ScoredBatch
from megatron_opd.weights.fingerprint import parameters_fingerprint


@dataclass
class Totals:
    """Sums over the whole run, resumes included; they are part of the checkpoint."""

    tokens_generated: int = 0
    tokens_trained: int = 0
    wall_s: float = 0.0
    bad_steps: int = 0  # steps skipped for NaN or a spike
    bad_in_a_row: int = 0

    def add(self, metrics: dict[str, Any], applied: bool) -> dict[str, Any]:
        """Counts one step, whose update was `applied` or skipped; returns the totals among its metrics."""
        self.tokens_generated += metrics["tokens_generated"]
        self.tokens_trained += metrics["tokens_trained"]
        self.wall_s += metrics["step_s"]
        self.bad_steps += not applied
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1
        return {"skipped_steps": self.bad_steps, "wall_s": self.wall_s}


class Run:
    """See the module's docstring. `step` counts finished steps."""

    def __init__(self, config: Config, label: str = "") -> None:
        """`label`: tells this run's lines from those of others in the same processes."""
        self.config = config
        self.device = init_distributed(config)
        self.is_writer = dist.get_rank() == 0
        self.progress = StepProgress(config.train.steps, 0, label) if self.is_writer else None
        self.guard = Guard(config.run_dir, config.train.watchdog_s)
        try:
            self._build(config)
        except BaseException:
            self.guard.close()
            raise

    def _build(self, config: Config) -> None:
        if self.guard.note:
            self.say(self.guard.note)
        build_loss(config)  # a name or an option that is wrong ends the run before models are loaded; the signal's, too
        make_signal(config.prune)
        check_engine(config)
        check_trackers(config)
        self.token_weighting = make_token_weighting(config.prune.token_weighting, config.prune.token_weighting_options)
        self.tokenizer, notes = load_tokenizers(config)
        self.rewards: PastDriftRewards | None = None
        rewarded = config.prune.after_drift == "grpo"
        prompts = load_prompts(
            config.data, self.tokenizer, rewarded or None, config.data.verifier, config.teacher_by_source
        )
        check_sources(config, prompts)
        self.eval_sets: list[EvalSet] = load_eval_sets(config.eval, config.data, self.tokenizer)
        check_lengths(config, prompts, [(s.config.name, s.config.max_tokens, s.prompts) for s in self.eval_sets])
        if rewarded:
            self.rewards = PastDriftRewards(config, self.tokenizer, self.say)
            self.rewards.check(prompts.prompts)
        self.loader = PromptLoader(prompts, config.train.seed, config.data.shuffle)
        self.stop = resolve_stop(config, self.tokenizer)
        notes += [self.stop.note] if self.stop.note else []
        self.trainer: Trainer = build_trainer(config, self.device)
        for name, teacher in self.trainer.teachers.items():
            teacher.terminators = tuple(sorted(self.stop.teachers[name])) if self.stop.event else ()
        student = self.trainer.student
        notes += check_vocabularies(self.trainer, self.tokenizer, config)
        self.engine: RolloutEngine = make_engine(config, student, set(self.tokenizer.eos_ids))
        if self.progress is not None:
            self.engine.on_progress = self.progress.responses
        self.carry: CarryOver | None = None
        if config.rollout.carry_over == "finished":
            self.carry = CarryOver(self.engine, config)
        self.teachers = Teachers(self.trainer.teachers, config.teacher_of_source)
        self.scoring = make_scoring(config, self.carry or self.engine, self.teachers)
        self.training_step = TrainingStep(self.trainer, config)
        self.targets = make_targets(config, self.trainer.reference, self.teachers)
        self.budget = make_budget(config)
        self.totals = Totals()
        self.step = 0
        self.unreported: dict[str, Any] | None = None  # the last step's metrics while its evaluation is not done
        self.alarms = AlarmWatch(config, self.say)
        self.checkpoints = Checkpointer(config, self.trainer, self.say, self.carry.tensors if self.carry else dict)
        for note in [*notes, prompts.summary()]:
            self.say(note)
        self._resume()
        first = self.step + (self.unreported is None)  # that is still to be reported
        self.files: RunFiles | None = None
        with together():
            if self.is_writer:
                self.files = self._open_files(first)
        self.probe = None
        if config.rollout.engine != "megatron":
            self.probe = HandoverProbe(config, self.trainer, self.engine)
        self.alarms.begin(self.hand_over())

    def _open_files(self, first: int) -> RunFiles:
        """Opens what the run writes, metrics from step `first` on. Raises InputError."""
        try:
            world = dist.get_world_size()
            return RunFiles(self.config, self.step, first, world, self.tokenizer, self.teachers)
        except OSError as error:
            raise InputError(f"run_dir: {self.config.run_dir} cannot be written to: {describe(error)}") from error

    @property
    def finished(self) -> bool:
        return self.step >= self.config.train.steps

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def report(self, metrics: dict[str, Any]) -> None:
        """One step's metrics to the files and to the reader, with a warning while saving fails."""
        metrics["checkpoint_s"] = self.checkpoints.take_seconds()  # that training waited since the last report
        add_warning(metrics, self.checkpoints.warning)
        add_warning(metrics, self.carry.lengths.take_warning() if self.carry is not None else "")
        if self.files is not None and self.progress is not None:
            problem = self.files.report(metrics)
            if problem:
                self.say(f"WARNING: {problem}")
            self.progress.step(metrics)

    def record(self, batch: ScoredBatch) -> None:
        """Some of the step's responses, and where they drift, for people to look at."""
        if self.files is not None:
            self.files.record(self.step, batch, self.scoring.signal)

    def keep_bad_step(self, reason: str, batch: ScoredBatch) -> None:
        """Writes down a batch whose step was skipped, and says where."""
        where = ""
        if self.is_writer:
            try:
                where = f"; its batch: {dump_bad_step(self.config.run_dir, self.step, reason, batch)}"
            except OSError as error:
                where = f"; its batch cannot be written: {error}"
        self.say(f"step {self.step} skipped: {reason}{where}")

    def draw_requests(self) -> list[Request]:
        """The next step's prompts, each once for every response that it is to get, in prompt-major order; before them
        what earlier steps have left unfinished."""
        if self.carry is not None:
            return self.carry.draw(self.loader.next_batch, self.step)
        settings = self.config.train
        prompts, copies = self.loader.next_batch(settings.prompts_per_step), settings.responses_per_prompt
        rewarded = self.config.prune.reward_prompts(len(prompts))  # the loader has shuffled them
        return [
            Request(prompt, i * copies + j, rewarded=i < rewarded)
            for i, prompt in enumerate(prompts)
            for j in range(copies)
        ]

    def sampling(self) -> Sampling:
        """How the next step's responses are sampled."""
        rollout = self.config.rollout
        return Sampling(
            max_tokens=self.budget.current,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.config.train.seed * 1_000_003 + self.step,
            top_logprobs=self.scoring.candidates,
        )

    def carried(self, batch: ScoredBatch) -> dict[str, Any]:
        """The step's numbers of rollout.carry_over; none where it is off."""
        return self.carry.metrics(batch.rollouts) if self.carry is not None else {}

    def by_teacher(self, batch: ScoredBatch) -> dict[str, Any]:
        """The step's numbers of each teacher; none where there is one."""
        weights = next((t.weights for t in self.targets if isinstance(t, TeacherShares)), {})
        return teacher_metrics(batch, self.teachers, weights)

    def taught(self, batch: ScoredBatch) -> ScoredBatch:
        """The batch to train on: with another target than the teacher's own log-probs, where the config names one."""
        for target in self.targets:
            batch = target.of(batch)
        return batch

    def move_budget(self, effective_lengths: list[int]) -> dict[str, Any]:
        """Sets the next step's budget and returns this step's numbers; see prune.budget.rule."""
        budget = self.budget
        metrics = {"hit_ratio": budget.measure(effective_lengths), "budget": budget.current}
        if self.config.prune.moves_budget:
            budget.update_from_hit_ratio(metrics["hit_ratio"])
        return metrics | {"budget_next": budget.current, "no_hit_steps": budget.no_hit_steps}

    def hand_over(self) -> dict[str, float]:
        """Gives the engine the current parameters; also before the first step, so that a broken path fails early.
        Returns the probe's gaps, for engines that have one."""
        self.engine.wake()  # it sleeps while the student trains; evaluations and the next rollout find it awake
        self.engine.update_parameters(lambda: hf_stream(self.trainer.student, self.config), self.step)
        return self.probe() if self.probe is not None else {}

    def watch(self, batch: ScoredBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        """The alarms hear of the step that has these metrics; returns theirs."""
        seen = watch_step(batch, metrics, self.trainer.student.vocab_size, self.stop)
        return self.alarms.hear(self.step, seen)

    def evaluate(self) -> tuple[dict[str, float], str]:
        """Accuracy (avg@k) of each data set with the engine's parameters; and which files failed, if any."""
        out = os.path.join(self.config.run_dir, "eval")
        parameters = parameters_fingerprint(self.trainer.student, self.config.rollout.bucket_mb << 20)
        result = evaluate(
            self.engine,
            self.eval_sets,
            self.tokenizer,
            self.config.eval,
            out,
            self.step,
            self.is_writer,
            parameters,
            files_may_fail=True,
        )
        for name, numbers in result["sets"].items():
            notes = "".join(f"; {note}" for note in result["notes"].get(name, ()))
            self.say(f"step {self.step}  eval {name}: accuracy {numbers['accuracy']:.3f}{notes}")
        return result["accuracy"], "; ".join(result["warnings"])

    def state(self) -> dict[str, Any]:
        """What a resume needs beside parameters and optimizer."""
        return {
            "step": self.step,
            "budget": self.budget.state_dict(),
            "loader": self.loader.state_dict(),
            "totals": vars(self.totals).copy(),
            "norms": list(self.training_step.norms),
            "unreported": self.unreported,
            "alarms": self.alarms.state_dict(),
            "targets": {type(target).__name__: target.state_dict() for target in self.targets},
        } | ({"carried": self.carry.state_dict()} if self.carry is not None else {})

    def _resume(self) -> None:
        state = self.checkpoints.load_latest()
        if state is None:
            return
        self.step = state["step"]
        if self.config.prune.moves_budget and (changed := self.budget.load_state_dict(state["budget"])):
            said = f"prune.budget has changed since the checkpoint: {', '.join(changed)}"
            self.say(f"{said}; goes on at {self.budget.current}")
        self.loader.load_state_dict(state["loader"])
        self.totals = Totals(**state["totals"])
        self.training_step.norms = state["norms"]
        self.alarms.load_state_dict(state.get("alarms", {}))  # checkpoints of version 0.1 have none
        for target in self.targets:
            if saved := state.get("targets", {}).get(type(target).__name__):
                target.load_state_dict(saved)
        self._resume_carried(state.get("carried"))
        # It may have been reported after the checkpoint was written. "owed" is its key in checkpoints of version 0.1.
        reported = on_rank_0(lambda: was_reported(self.config.run_dir, self.step), otherwise=InputError)
        self.unreported = None if reported else state.get("unreported", state.get("owed"))
        self.say(f"resumed at step {self.step}")

    def _resume_carried(self, state: dict[str, Any] | None) -> None:
        """The responses that were under way, if any; checkpoints of runs without rollout.carry_over have none."""
        if self.carry is not None:
            self.carry.drawn = self.step * self.config.train.prompts_per_step
            if state is not None:
                self.carry.load_state_dict(state, self.checkpoints.carried, self.loader.prompts.prompts)
        elif state is not None and state["responses"]:
            dropped = len(state["responses"])
            self.say(f"WARNING: rollout.carry_over: off drops {dropped} responses that the checkpoint has under way")

    def close(self) -> None:
        self.checkpoints.close()
        self.engine.close()
        if self.rewards is not None:
            self.rewards.close()
        if self.files is not None:
            self.files.close()
        if self.progress is not None:
            self.progress.close()
        self.guard.close()


def load_tokenizers(config: Config) -> tuple[Tokenizer, list[str]]:
    """The student's tokenizer and remarks on harmless differences to the teachers'; raises on any other."""
    tokenizer = load_tokenizer(config.data.tokenizer or config.student.model)
    notes: list[str] = []
    for teacher in config.teacher_by_name.values():
        notes += [n for n in compare_tokenizers(tokenizer, load_tokenizer(teacher.model)) if n not in notes]
    return tokenizer, notes


def check_vocabularies(trainer: Trainer, tokenizer: Tokenizer, config: Config) -> list[str]:
    """Both models embed every id of the tokenizer; where one has more ids beyond it than the other (Qwen2.5's 1.5B and
    7B, say), both go on with those that they share. Returns what to tell the user.

    Raises TokenizerError where a model lacks an id, ConfigError where fused scoring would meet shards of two widths.
    """
    student, teachers = trainer.student, trainer.teachers
    check_model_vocabulary(tokenizer, student.vocab_size, config.student.model)
    for name, teacher in teachers.items():
        check_model_vocabulary(tokenizer, teacher.vocab_size, config.teacher_by_name[name].model)
    least = min(teacher.vocab_size for teacher in teachers.values())
    if (reference := trainer.reference) is not None and config.loss.reference:
        check_model_vocabulary(tokenizer, reference.vocab_size, config.loss.reference)
    notes = recompute_notes(trainer, config)
    if reference is not None:
        reference.vocab_size = min(m.vocab_size for m in (student, *teachers.values(), reference))
    shared = min(student.vocab_size, least)
    if config.candidates > shared:
        raise ConfigError(
            f"prune.k: {config.prune.k}, loss.k: {config.loss.k}: the models share {shared} ids; set {shared} or less"
        )
    if all(student.vocab_size == teacher.vocab_size for teacher in teachers.values()):
        return notes
    sizes = f"student.model embeds {student.vocab_size} ids, " + ", ".join(
        f"{teacher.name}.model {teacher.vocab_size}" for teacher in teachers.values()
    )
    if config.score.mode == "fused":
        raise ConfigError(f"{sizes}: their logits differ in width; set score.mode: separate")
    if config.rollout.engine == "vllm" and student.vocab_size > least:
        raise ConfigError(f"{sizes}: vLLM would sample ids that the teacher lacks; set rollout.engine: megatron")
    for model in (student, *teachers.values()):
        model.vocab_size = shared
    return [
        *notes,
        f"{sizes}; the tokenizer has {tokenizer.vocab_size}, and ids from {student.vocab_size} on are padding",
    ]


def recompute_notes(trainer: Trainer, config: Config) -> list[str]:
    """Where recomputing saves nothing."""
    if config.student.recompute == "selective" and trainer.student.transformer_engine:
        return [
            "WARNING: student.recompute: selective repeats attention alone, and Transformer Engine's fused attention "
            "keeps next to nothing of it: set none, or full where memory is short"
        ]
    return []


def check_sources(config: Config, prompts: PromptSet) -> None:
    """Raises ConfigError where a teacher is given a source that no prompt has."""
    known = sorted({p.source for p in prompts.prompts})
    for source, name in config.teacher_of_source.items():
        if source not in known:
            near = ", ".join(repr(s) for s in known[:8])
            raise ConfigError(
                f"teachers[{name}].sources: no prompt of {config.data.prompts} is from {source!r} (data.source_key: "
                f"{config.data.source_key}); they are from {near}"
            )


def make_budget(config: Config) -> ResponseBudget:
    """The budget controller of `prune.budget.rule`."""
    settings = config.prune.budget
    kind = StaircaseBudget if settings.rule == "staircase" else ResponseBudget
    fixed = max(1, int(settings.share * settings.maximum))
    initial = settings.initial if config.prune.moves_budget else fixed
    return kind(
        initial,
        min(settings.minimum, initial),
        settings.maximum,
        settings.step,
        settings.margin,
        settings.hit_ratio,
        settings.patience,
    )
