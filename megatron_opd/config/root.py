"""The whole configuration, and what its sections demand of each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import FilePath, Section, TrackerName
from megatron_opd.config.data import DataConfig, EvalConfig
from megatron_opd.config.models import ModelConfig, NamedTeacherConfig, TeacherConfig
from megatron_opd.config.prune import PruneConfig
from megatron_opd.config.rollout import RolloutConfig
from megatron_opd.config.training import CheckpointConfig, LossConfig, ScoreConfig, TrackingConfig, TrainConfig
from megatron_opd.plugins import LOSSES, Reads

DEFAULT_TEACHER = "teacher"  # the name of `teacher` among the teachers


class Config(Section):
    run_dir: FilePath = "runs/default"
    """Where metrics, logs, checkpoints and evaluations are written."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU. The CPU build runs on gloo."""
    student: ModelConfig
    """The model that learns."""
    teacher: TeacherConfig
    """The model that judges."""
    teachers: list[NamedTeacherConfig] = Field(default_factory=list)
    """More models that judge, each the prompts of some sources; every other prompt is `teacher`'s."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Generation."""
    prune: PruneConfig = Field(default_factory=PruneConfig)
    """Drift, weights, cutting and the budget."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """The distillation loss."""
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    """The teacher's pass."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Optimization."""
    data: DataConfig
    """Training prompts."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    logging: list[TrackerName] = Field(default_factory=lambda: ["tensorboard"])
    """Trackers that get the metrics beside metrics.jsonl, each once: any of tensorboard, wandb, mlflow, swanlab,
    trackio."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """What the trackers of `logging` are told."""

    @property
    def loss_k(self) -> int:
        """Candidates per position of the top-k loss."""
        return self.loss.k or self.prune.k

    @property
    def candidates(self) -> int:
        """The student's most likely tokens that are kept at each position."""
        return max(self.prune.k, self.loss_k)

    @property
    def teacher_by_name(self) -> dict[str, TeacherConfig]:
        """Every teacher; `teacher` itself is called "teacher"."""
        return {DEFAULT_TEACHER: self.teacher, **{t.name: t for t in self.teachers}}

    @property
    def teacher_of_source(self) -> dict[str, str]:
        """Names of teachers by the prompts' sources; a source that is not in it is DEFAULT_TEACHER's."""
        return {source: t.name for t in self.teachers for source in t.sources}

    @property
    def teacher_by_source(self) -> dict[str, TeacherConfig]:
        """Teachers by the prompts' sources; "" is `teacher`, of all other sources."""
        return {"": self.teacher, **{source: t for t in self.teachers for source in t.sources}}

    @property
    def kept_candidates(self) -> int:
        """Those that the engine returns with each token: none where the trainer's own logits are taken."""
        return 0 if self.score.mode == "fused" else self.candidates

    def loss_problems(self, reads: Reads, fused_head: bool) -> list[str]:
        """What the rest of the config cannot give a loss that reads this of the teacher. Of a loss of the package the
        config knows it; of one's own, who has built it asks here."""
        problems = []
        if reads == "logits" and self.score.mode != "fused" and self.score.payload != "hidden":
            problems.append(
                f"loss.kind: {self.loss.kind} reads the teacher's whole distribution; set score.mode: fused, or "
                "score.payload: hidden, which any two layouts can have"
            )
        if reads != "logits" and self.score.payload == "hidden":
            problems.append(
                f"score.payload: hidden sends states that loss.kind: {self.loss.kind} does not read; set "
                "score.payload: topk"
            )
        if reads == "logits" and self.loss.advantage_clip is not None:
            problems.append(
                f"loss.advantage_clip: {self.loss.advantage_clip} bounds log-probs of candidates and sampled tokens; "
                f"loss.kind: {self.loss.kind} reads the teacher's whole distribution: set null"
            )
        if reads == "logits" and self.loss.changes_scores:
            problems.append(
                f"loss.kind: {self.loss.kind} reads the teacher's whole distribution; loss.reward_scale and "
                "loss.proximal change log-probs of candidates: set topk_reverse_kl or sampled_reverse_kl"
            )
        if self.loss.fused_head and not fused_head:
            problems.append(
                "loss.fused_head: true works with losses on a few log-probs (topk_reverse_kl, sampled_reverse_kl, a "
                f"LogprobLoss of your own); {self.loss.kind} reads whole logits: set loss.fused_head: false"
            )
        if self.loss.fused_head and self.score.mode == "fused":
            problems.append(
                "loss.fused_head: true works with score.mode: separate; fused scoring compares whole logits of both "
                "models: set loss.fused_head: false"
            )
        return problems

    def group_problems(self) -> list[str]:
        """What else would set the advantage or the denominator that loss.advantage: group sets."""
        others = []
        if self.prune.after_drift == "grpo":
            others.append("prune.after_drift: grpo; set drop")
        if self.prune.token_weighting != "none":
            others.append(f"prune.token_weighting: {self.prune.token_weighting}; set none")
        if self.rollout.importance_clip is not None:
            others.append(f"rollout.importance_clip: {self.rollout.importance_clip}; set null")
        return [f"loss.advantage: group excludes {other}" for other in others]

    def teacher_problems(self) -> list[str]:
        """What several teachers do not go with."""
        problems = []
        if self.teachers and self.score.mode == "fused":
            problems.append("score.mode: fused has one teacher beside the student; with teachers: set separate")
        if self.teachers and self.score.payload == "hidden":
            problems.append("score.payload: hidden rebuilds one teacher's logits; with teachers: set topk")
        names = [DEFAULT_TEACHER, *(t.name for t in self.teachers)]
        sources = [source for t in self.teachers for source in t.sources]
        for what, values in (("name", names), ("source", sources)):
            if twice := sorted({v for v in values if values.count(v) > 1}):
                problems.append(f"teachers: the {what} {twice[0]!r} is there twice; each has one teacher")
        for name, teacher in self.teacher_by_name.items():
            key = "teacher" if name == DEFAULT_TEACHER else f"teachers[{name}]"
            if teacher.system is not None and self.data.template == "none":
                problems.append(f"{key}.system: needs messages to stand before; set data.template: chat")
            if teacher.parallel.expert > 1 and (self.prune.in_flight or self.prune.cut != "none"):
                problems.append(
                    f"{key}.parallel.expert: {teacher.parallel.expert} spans replicas that score responses of "
                    "different numbers of segments; set prune.in_flight: false and prune.cut: none, or expert: 1"
                )
        return problems + self.share_problems()

    def share_problems(self) -> list[str]:
        """What the weights of teachers and responses do not go with."""
        loss, problems = self.loss, []
        if unknown := sorted(loss.teacher_shares.keys() - self.teacher_by_name.keys()):
            known = ", ".join(self.teacher_by_name)
            problems.append(f"loss.teacher_shares: there is no teacher {unknown[0]!r}; there are {known}")
        if loss.teacher_shares and not unknown and loss.teacher_shares.keys() != self.teacher_by_name.keys():
            missing = next(name for name in self.teacher_by_name if name not in loss.teacher_shares)
            problems.append(f"loss.teacher_shares: names every teacher or none; {missing!r} is missing")
        if loss.disagreement and not self.teachers:
            problems.append(f"loss.disagreement: {loss.disagreement} compares teachers, and there is one; set 0")
        weighs = [key for key, value in loss.weighs.items() if value]
        if weighs and self.score.mode == "fused":
            problems.append(f"{weighs[0]} needs the scores before training; set score.mode: separate")
        if weighs and loss.advantage == "group":
            problems.append(f"{weighs[0]} sets the denominator or the advantage that loss.advantage: group sets")
        return problems

    def reward_problems(self) -> list[str]:
        """Why no reward past the drift point could ever teach anything: what makes all advantages 0."""
        prune, train = self.prune, self.train
        if prune.after_drift != "grpo":
            return []
        problems = []
        if train.responses_per_prompt == 1:
            problems.append(
                "train.responses_per_prompt: 1 leaves prune.after_drift: grpo no reward, which is normalised over a "
                "prompt's responses; raise it or set after_drift: drop"
            )
        if prune.reward_prompts(train.prompts_per_step) == 0:
            problems.append(
                f"prune.grpo_share: {prune.grpo_share} of train.prompts_per_step: {train.prompts_per_step} rounds to "
                "no prompt, so that none has a reward; raise either or set prune.after_drift: drop"
            )
        if prune.grpo_coefficient == 0:
            problems.append("prune.grpo_coefficient: 0 weighs every reward with 0; raise it or set after_drift: drop")
        if prune.w_drop == 0 or (prune.signal == "overlap" and prune.threshold == 0):
            problems.append(
                f"prune.w_drop: {prune.w_drop} with threshold: {prune.threshold} never comes to a drift point, past "
                "which after_drift: grpo gives rewards; raise them or set after_drift: drop"
            )
        if self.rollout.temperature == 0 or self.rollout.top_k == 1:
            problems.append(
                f"rollout.temperature: {self.rollout.temperature} with top_k: {self.rollout.top_k} makes a prompt's "
                "responses equal, and so their rewards: after_drift: grpo needs sampling"
            )
        return problems

    @model_validator(mode="after")
    def _check(self) -> Config:
        problems = self.reward_problems() + self.teacher_problems()
        if self.student.fp8_params and not self.train.distributed_optimizer:
            problems.append("student.fp8_params: true needs train.distributed_optimizer: true, which gathers them")
        if self.student.fp8_params and self.student.fp8_recipe == "mxfp8":
            problems.append(
                "student.fp8_params: true is not supported with fp8_recipe: mxfp8; set fp8_params: false or another "
                "recipe"
            )
        if self.score.mode == "fused":
            if self.teacher.reads_another_prompt:
                problems.append(
                    "score.mode: fused feeds both models one row; teacher.system and teacher.context_key give the "
                    "teacher another prompt: set score.mode: separate"
                )
            if self.score.payload != "topk":
                problems.append("score.mode: fused has the teacher's logits and sends nothing; set score.payload: topk")
            if self.student.parallel != self.teacher.parallel:
                problems.append("score.mode: fused needs student.parallel and teacher.parallel to be equal")
            if self.student.precision != self.teacher.precision:
                problems.append("score.mode: fused needs student.precision and teacher.precision to be equal")
            if self.teacher.offload:
                problems.append("score.mode: fused needs the teacher beside the student; set teacher.offload: false")
            if self.loss.changes_scores:
                problems.append(
                    "loss.reward_scale, loss.proximal and loss.advantage: group need the scores before training; set "
                    "score.mode: separate"
                )
            if self.loss.stop == "event":
                problems.append("loss.stop: event needs the scores before training; set score.mode: separate")
            if self.prune.in_flight:
                problems.append("score.mode: fused scores after generation; it excludes prune.in_flight: true")
            if self.prune.cut != "none":
                problems.append("score.mode: fused learns the drift point too late to cut; set prune.cut: none")
            if self.prune.token_weighting != "none":
                problems.append(
                    f"prune.token_weighting: {self.prune.token_weighting} needs the whole batch's scores before the "
                    "first micro-batch is trained on; set score.mode: separate"
                )
        if self.loss.advantage == "group":
            problems += self.group_problems()
        if loss := LOSSES.get(self.loss.kind):
            problems += self.loss_problems(loss.reads, loss.fused_head)
        if self.student.parallel.expert > 1 and self.rollout.engine == "megatron":
            problems.append(
                f"student.parallel.expert: {self.student.parallel.expert} spans replicas that generate for different "
                "numbers of tokens; set rollout.engine: vllm"
            )
        names = [s.name for s in self.eval.sets]
        if len(set(names)) != len(names):
            problems.append(f"eval.sets: names must differ, got {names}")
        if problems:
            raise ValueError("; ".join(problems))
        return self
