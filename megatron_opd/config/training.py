"""The loss, the teacher's pass, optimization and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import LARGEST_SEED, Count, DecayRate, FilePath, LossName, Positive, Section
from megatron_opd.plugins import LOSSES


class LossConfig(Section):
    kind: LossName = "topk_reverse_kl"
    """The distillation loss: topk_reverse_kl (the published one), sampled_reverse_kl, full_reverse_kl, forward_kl,
    generalized_jsd, or MODULE:NAME, a subclass of megatron_opd.losses.Loss of your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Parameters of a loss of your own, given to it by keyword."""
    k: Positive | None = None
    """Candidates per position of topk_reverse_kl; null takes prune.k, as the method does."""
    jsd_beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Interpolation of generalized_jsd: towards 0 the forward, towards 1 the reverse KL."""
    chunk_tokens: Positive = 1024
    """Tokens whose logits are held in fp32 at once; with `fused_head`, whose logits exist at all."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What works on logits. auto: Triton on a GPU, torch on the CPU. torch: torch everywhere. triton: Triton
    everywhere; on the CPU that is its interpreter, TRITON_INTERPRET=1, for tests."""
    stop: Literal["auto", "token", "event"] = "auto"
    """What a stop is to the loss. token: a token as any other. event: the mass of all tokens that end a response, each
    model's own, for models that stop on different ones. auto: event where they do and `score.mode` is separate; the
    choice is printed, and `megatron-opd doctor` measures both."""
    reward_scale: float = Field(default=1.0, gt=0)
    """ExOPD: how far to go from `reference` to the teacher, 1 as far as the teacher, 1.25 beyond it. Needs log-probs
    (topk_reverse_kl, sampled_reverse_kl or your own) and score.mode: separate; docs/methods.md."""
    reference: FilePath | None = None
    """The model that `reward_scale` counts from. null: the student as it started, student.model. A directory: one of
    the teacher's shape, in its layout, that reads its prompts: what the teacher was before its own training, say."""
    proximal: float | None = Field(default=None, gt=0, le=1)
    """TOP-D: this share of the teacher's probabilities and the rest of the sampler's is learnt from; 0.1 to 0.3 are
    published, null and 1 are the teacher alone. Needs what reward_scale needs."""
    advantage: Literal["token", "group"] = "token"
    """With sampled_reverse_kl. token: log q - log p at each token. group: TOP-D's, with the mean over the later tokens
    of the response, standardised over all tokens of a prompt's responses."""
    mean: Literal["token", "sequence"] = "token"
    """Of the batch's terms. token: over all response tokens, the method's. sequence: over the responses, each of which
    counts with the mean over its tokens."""
    teacher_shares: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """With several teachers: the share of the batch's tokens that each is to have, by its name; `teacher` is the first.
    Tokens are weighed by wanted over actual share (Open-MOPD). Empty: as they come."""
    disagreement: float = Field(default=0.0, ge=-4, le=4)
    """With several teachers: exponent of the weight that a teacher gains by its mean distance from the student, against
    that of all (Open-MOPD: 1). 0 is off; below 0 a run may diverge."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Bound on |log q - log p| at each candidate and sampled token, p the sampler's; 5 and 20 are published. null: no
    bound."""
    fused_head: bool = False
    """Student's output layer and loss in one, in chunks of `chunk_tokens`, so that a row's logits are never whole: the
    memory of long rows. For topk_reverse_kl, sampled_reverse_kl and a LogprobLoss of your own with score.mode:
    separate."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What the loss is built with: `options`, and the keys of this section that are its own."""
        entry = LOSSES.get(self.kind)
        return {name: getattr(self, name) for name in entry.options} if entry else dict(self.options)

    @property
    def weighs(self) -> dict[str, bool]:
        """The keys that change tokens' weights or scores before training, and whether they do."""
        return {
            f"loss.mean: {self.mean}": self.mean != "token",
            "loss.teacher_shares": bool(self.teacher_shares),
            f"loss.disagreement: {self.disagreement}": self.disagreement != 0,
            f"loss.advantage_clip: {self.advantage_clip}": self.advantage_clip is not None,
        }

    @property
    def changes_scores(self) -> bool:
        """Whether the loss learns from something else than the teacher's own log-probs."""
        return self.reward_scale != 1 or self.proximal is not None or self.advantage == "group"

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.reward_scale != 1 and self.proximal is not None:
            raise ValueError(
                f"reward_scale: {self.reward_scale} goes beyond the teacher and proximal: {self.proximal} stays before "
                "it; give one of them"
            )
        if self.reference is not None and self.reward_scale == 1:
            raise ValueError(f"reference: {self.reference} is for a reward_scale other than 1, which is plain OPD")
        if self.advantage == "group" and self.kind != "sampled_reverse_kl":
            raise ValueError(f"advantage: group is of sampled tokens; kind: {self.kind}: set sampled_reverse_kl")
        if self.changes_scores and self.stop == "event":
            raise ValueError(
                "stop: event puts the event's log-probs in place of the teacher's, as reward_scale, proximal and "
                "advantage: group do with others: set stop: token (proximal bounds what a stop is punished by)"
            )
        if self.options and self.kind in LOSSES:
            raise ValueError(
                f"options: are for a loss of your own, MODULE:NAME; kind: {self.kind} takes none: {self.options}"
            )
        return self


class ScoreConfig(Section):
    mode: Literal["separate", "fused"] = "separate"
    """separate: the teacher's own forward pass in its own layout. fused: the teacher's stage runs beside the student's
    in one schedule; needs equal layouts."""
    payload: Literal["topk", "hidden"] = "topk"
    """What the teacher sends of each response token, with mode: separate. topk: log-probs of the student's candidates.
    hidden: besides, the states that its output layer reads, from which the training ranks rebuild its logits chunk by
    chunk: losses over the whole vocabulary then work in any two layouts and in flight."""


class TrainConfig(Section):
    renamed: ClassVar[dict[str, str]] = {"answers_per_prompt": "responses_per_prompt"}

    steps: Positive = 203
    """Optimizer steps."""
    prompts_per_step: Positive = 64
    """Prompts of one step, over all ranks."""
    responses_per_prompt: Positive = 4
    """Responses sampled for each prompt."""
    lr: float = Field(default=1.0e-6, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from lr to min_lr over `steps`."""
    warmup_steps: Count = 0
    """Steps of linear warm-up; step k of them trains at lr k / warmup_steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay (not on norms and biases)."""
    adam_beta1: DecayRate = 0.9
    """Adam's first decay rate."""
    adam_beta2: DecayRate = 0.95
    """Adam's second decay rate."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 for no clipping."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    tokens_per_microbatch: Positive = 16384
    """Sequences are packed into micro-batches of at most this many tokens (a longer sequence gets its own), counted
    over all context-parallel ranks, of which each holds 1/context."""
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] = 1234
    """Seeds sampling, shuffling and initialisation."""
    max_bad_steps: Positive = 3
    """Steps in a row with NaN or infinite loss or gradients after which the run stops; each such step is skipped."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose gradient norm exceeds this multiple of the running median; null for never."""
    alarms: Literal["warn", "stop"] = "warn"
    """What an alarm does (docs/alarms.md): a teacher that teaches nothing, an engine with old parameters, lengths,
    entropy or repetition that run away. warn: it is said and stands in the metrics. stop: it ends the run, saved, with
    exit code 4."""
    watchdog_s: float = Field(default=1800.0, ge=1.0, le=1e8)
    """A step that takes longer writes every rank's stack to its log and ends the job. Outside steps, in an evaluation
    say, it is how long a rank waits for another one in a collective."""
    record_responses: Count = 4
    """Responses of each step that are written down with the drift of every token, spread over the batch, for
    `megatron-opd report` and `show`; 0 for none."""
    record_mb: Positive = 64
    """Bound on what these take, in MiB: where it is reached, only every second step's stay."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr: {self.lr}")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be below steps: {self.steps}")
        return self


class TrackingConfig(Section):
    project: str = Field(default="megatron_opd", min_length=1)
    """The project, or experiment, that the run belongs to."""
    name: str | None = None
    """What the run is called there; null takes the last part of run_dir."""
    responses: Count = 4
    """Responses that each evaluation, and the step before it, shows as a table."""
    checkpoints: bool = False
    """Send checkpoints as artifacts (W&B, MLflow)."""


class CheckpointConfig(Section):
    every: Count = 20
    """Save after every N steps; with 0 the run is saved at its end only."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of run_dir. never: refuse a run_dir that has one."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Count = 0
    """Checkpoints at multiples of N steps are kept for good; 0 keeps none."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    max_failures: Positive = 3
    """Failed saves in a row after which the run stops; it trains on until then."""
