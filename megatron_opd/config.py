"""The configuration: one typed tree, YAML plus `a.b=c` overrides, every key documented under its definition.

Needs pydantic and PyYAML alone, so that a login node can check a config. Paths in a YAML file are relative to that
file; paths in overrides are relative to the current directory. All problems are reported at once, each with the
key's full path, the value and what would work.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """One or more keys are wrong; the message lists all of them."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class _Base:
    directory = "."  # what relative paths are relative to, while a YAML file or an override is read


def _absolute(value: Any) -> Any:
    if not isinstance(value, str) or not value or value.startswith("reasoning_gym:"):
        return value
    return os.path.abspath(os.path.join(_Base.directory, os.path.expanduser(os.path.expandvars(value))))


FilePath = Annotated[str, BeforeValidator(_absolute)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ParallelConfig(_Section):
    tensor: Positive = 1
    """Tensor-parallel size. Must divide attention heads, key/value groups and the feed-forward width."""
    pipeline: Positive = 1
    """Pipeline-parallel size. Must divide the number of layers (times `virtual_pipeline`)."""
    virtual_pipeline: Positive = 1
    """Model chunks per pipeline stage; above 1 the interleaved schedule runs. Student only."""
    context: Positive = 1
    """Context-parallel size: each sequence's tokens are shared out over so many ranks, in training and in the teacher's
    pass over whole answers. Generation and scoring in flight use these ranks as further data-parallel ones."""
    expert: Positive = 1
    """Expert-parallel size of mixture-of-experts models."""
    sequence: bool = False
    """Sequence parallelism: norms and dropout work on 1/tensor of the tokens. Needs tensor > 1."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model; the rest of the world is data parallelism."""
        return self.tensor * self.pipeline * self.context

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1; set sequence: false or raise tensor")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline: {self.virtual_pipeline} needs pipeline > 1")
        return self


class ModelConfig(_Section):
    model: FilePath
    """A Hugging Face directory, or one made by `tools/convert.py import`."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Layout of this model over all ranks; student and teacher may differ."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations. Sums, losses and optimizer state are fp32 either way."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """Transformer Engine FP8 for the linear layers; null for none. Needs a GPU that has it."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales are found. tensorwise and blockwise (Hopper, CUDA 12.9) look at the values themselves, delayed at
    those of earlier training passes, hence for the student alone. mxfp8 needs Blackwell."""
    fp8_params: bool = False
    """Keep parameters in FP8 and gather them in FP8. The student needs train.distributed_optimizer."""
    fp8_bf16_ends: int = Field(default=0, ge=0)
    """Number of layers at each end of the model that stay in bf16. Not with fp8_recipe: delayed."""
    implementation: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation. auto: Transformer Engine on GPUs (an error if it is missing), local without a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass."""
    allow_pickle: bool = False
    """Accept pickled weights (`pytorch_model.bin`). A pickle file can run any code on load."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.fp8 and self.precision != "bf16":
            raise ValueError(f"fp8: {self.fp8} needs precision: bf16, not {self.precision}")
        if self.fp8 and self.implementation == "local":
            raise ValueError(f"fp8: {self.fp8} needs implementation: transformer_engine")
        if self.fp8_params and not self.fp8:
            raise ValueError("fp8_params: true needs fp8: hybrid or e4m3")
        if self.fp8_bf16_ends and not self.fp8:
            raise ValueError(f"fp8_bf16_ends: {self.fp8_bf16_ends} needs fp8: hybrid or e4m3")
        if self.fp8_bf16_ends and self.fp8_recipe == "delayed":
            raise ValueError(
                f"fp8_bf16_ends: {self.fp8_bf16_ends} cannot be had with fp8_recipe: delayed, whose scales are updated "
                "for all layers together; set fp8_recipe: tensorwise"
            )
        return self


class TeacherConfig(ModelConfig):
    offload: bool = False
    """Keep the teacher's parameters in host memory outside the scoring pass."""

    @model_validator(mode="after")
    def _check_teacher(self) -> TeacherConfig:
        if self.parallel.virtual_pipeline > 1:
            raise ValueError("virtual_pipeline is for the student: the teacher runs forward only")
        if self.fp8 and self.fp8_recipe == "delayed":
            raise ValueError(
                "fp8_recipe: delayed takes its scales from training passes, and the teacher has none; set fp8_recipe: "
                "tensorwise or blockwise"
            )
        if self.fp8_params and self.offload:
            raise ValueError("fp8_params: true cannot be moved to host memory; set offload: false or fp8_params: false")
        return self


class RolloutConfig(_Section):
    engine: Literal["megatron", "vllm"] = "megatron"
    """megatron: inside the training ranks, needs nothing else. vllm: what a cluster uses."""
    mode: Literal["colocate", "server"] = "colocate"
    """vLLM only. colocate: engines inside the training ranks. server: `vllm serve` processes at `servers`."""
    temperature: float = Field(default=1.0, ge=0.0)
    """Sampling temperature; 0 is greedy. The method uses 1.0."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1.0 is off."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k most likely tokens; 0 is off."""
    max_batch: Positive = 256
    """Answers in generation at once per data- and context-parallel rank (or vLLM engine); the others wait for a free
    place."""
    tensor: Positive = 1
    """vLLM only: tensor-parallel size of one engine."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0.0, le=1.0)
    """vLLM only: share of GPU memory that a colocated engine may use."""
    cpu_cache_mb: Positive = 512
    """vLLM without a GPU: key/value cache of a colocated engine."""
    enforce_eager: bool = False
    """vLLM only: no CUDA graphs and no compilation in colocated engines; slower, but ready sooner. Always so without a
    GPU. Servers take vLLM's own --enforce-eager."""
    max_model_len: int | None = None
    """vLLM only: longest prompt plus response; null takes what the config can reach."""
    servers: list[str] = Field(default_factory=list)
    """vLLM servers as http://HOST:PORT, one per replica."""
    api_key_env: str = "MEGATRON_OPD_VLLM_API_KEY"
    """Environment variable that holds the servers' API key; unset means none is sent."""
    server_timeout_s: float = Field(default=600.0, gt=0)
    """A request without an answer for this long counts as failed and goes to another replica."""
    server_retries: int = Field(default=5, ge=0)
    """Attempts per request after the first, with doubling back-off."""
    transfer: Literal["auto", "nccl", "ipc", "file"] = "auto"
    """How parameters reach the engines. auto: CUDA IPC or NCCL on GPUs, shared memory or the file system without."""
    transfer_dir: FilePath | None = None
    """Directory for `transfer: file` that servers can read; null takes /dev/shm on one node."""
    bucket_mb: Positive = 512
    """Parameters are gathered and handed over in buckets of at most this size."""
    sync_tolerance: float = Field(default=0.02, gt=0)
    """Largest gap (nats) between the engine's and the trainer's log-probs on the probe prompt after a hand-over. Where
    it is not given and `student.precision` is bf16, it is 1.0: bf16 logits of 16 to 32 are 0.125 apart."""
    gap_threshold: float = Field(default=0.5, gt=0)
    """A sampled token whose rollout and student log-probs differ by more (nats) is counted in the metrics."""
    importance_clip: float | None = Field(default=None, gt=0)
    """Truncated importance weights min(p_student / p_rollout, clip) on the loss; null for none."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.engine == "vllm" and self.mode == "server" and not self.servers:
            raise ValueError("mode: server needs servers: [http://HOST:PORT, ...]")
        if self.engine == "megatron" and self.mode == "server":
            raise ValueError("mode: server needs engine: vllm; engine: megatron is always colocated")
        return self


class BudgetConfig(_Section):
    initial: Positive = 2048
    """Budget of the first step, in generated tokens."""
    minimum: Positive = 1024
    """The budget never falls below this."""
    maximum: Positive = 12288
    """The budget never grows above this; with `preset: off` it is the budget of every step."""
    step: Positive = 100
    """Tokens by which the budget grows or shrinks."""
    margin: int = Field(default=100, ge=0)
    """An answer is a hit where its effective length reaches max(minimum, budget - margin)."""
    hit_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of hits in a batch from which the budget grows."""
    patience: Positive = 3
    """Steps in a row below `hit_ratio` after which the budget shrinks."""

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial: {self.initial} must lie between minimum: {self.minimum} and maximum: {self.maximum}"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.5, "cut": "none", "in_flight": False},
    "in_flight": {"signal": "overlap", "w_drop": 0.01, "w_base": 0.0, "cut": "reliability", "in_flight": True},
    "off": {"signal": "none", "cut": "none", "in_flight": False},
}


class PruneConfig(_Section):
    preset: Literal["paper", "off", "in_flight"] = "paper"
    """Values for the keys below that are not given. paper: the published method to the letter. in_flight: generation
    and training stop at the drift point. off: plain on-policy distillation, nothing watched, budget at its maximum."""
    signal: Literal["overlap", "teacher_top_p", "none"] = "overlap"
    """What makes a drift event: low top-k overlap, or a sampled token outside the teacher's nucleus."""
    k: Positive = 16
    """Candidates per position whose overlap is taken; also those of the top-k loss, unless `loss.k` says otherwise."""
    threshold: Fraction = 0.7
    """Overlap below this is an event."""
    teacher_top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    """Nucleus mass of the `teacher_top_p` signal, inside the teacher's top k."""
    w_drop: float = Field(default=0.01, ge=0.0, le=1.0)
    """Reliability lost per event."""
    w_base: float = Field(default=0.5, ge=0.0)
    """Added to the reliability to give the prune weight."""
    cut: Literal["none", "reliability"] = "none"
    """reliability: what follows the last reliable position is not trained on and costs nothing."""
    in_flight: bool = False
    """Score while generating and stop an answer whose reliability is spent."""
    segment: Positive = 128
    """Tokens between two looks of the teacher, in flight."""
    after_drift: Literal["drop", "attenuate", "grpo"] = "drop"
    """in_flight only. drop: answers end at their drift point. attenuate: they are generated on and trained on with
    w_base. grpo: for `grpo_share` of the prompts they are generated on, and positions past the drift point learn from
    the verifier's reward, normalised over the prompt's answers."""
    grpo_share: Fraction = 0.25
    """Share of prompts whose answers are generated to the end for `after_drift: grpo`."""
    grpo_coefficient: float = Field(default=1.0, ge=0.0)
    """Weight of the reward's policy gradient beside the distillation loss."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """The response budget."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("preset") is False:  # YAML reads a bare off as false
                values = {**values, "preset": "off"}
            return {**PRESETS.get(values.get("preset", "paper"), {}), **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.signal == "none" and self.in_flight:
            raise ValueError("in_flight: true needs a signal: overlap or teacher_top_p")
        if self.signal == "none" and self.cut != "none":
            raise ValueError(f"cut: {self.cut} needs a signal: overlap or teacher_top_p")
        if self.cut == "reliability" and self.w_base > 0:
            raise ValueError(
                f"cut: reliability drops what w_base: {self.w_base} would train on; set w_base: 0 or cut: none"
            )
        if self.in_flight and self.cut == "none" and self.after_drift == "drop":
            raise ValueError("in_flight: true with after_drift: drop stops at the drift point; set cut: reliability")
        if self.after_drift != "drop" and not self.in_flight:
            raise ValueError(f"after_drift: {self.after_drift} needs in_flight: true")
        if self.after_drift == "grpo" and self.cut == "none":
            raise ValueError("after_drift: grpo replaces the teacher past the drift point: set cut: reliability")
        if self.after_drift == "attenuate" and (self.cut != "none" or self.w_base == 0):
            raise ValueError("after_drift: attenuate trains past the drift point: set cut: none and w_base above 0")
        return self


class LossConfig(_Section):
    kind: Literal["topk_reverse_kl", "sampled_reverse_kl", "full_reverse_kl", "forward_kl", "generalized_jsd"] = (
        "topk_reverse_kl"
    )
    """The distillation loss. topk_reverse_kl is the published one."""
    k: Positive | None = None
    """Candidates per position of topk_reverse_kl; null takes prune.k, as the method does."""
    jsd_beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Interpolation of generalized_jsd: towards 0 the forward, towards 1 the reverse KL."""
    chunk_tokens: Positive = 1024
    """Tokens whose logits are held in fp32 at once; with `fused_head`, whose logits exist at all."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What works on logits. auto: Triton on a GPU, torch on the CPU. torch: torch everywhere. triton: Triton
    everywhere; on the CPU that is its interpreter, TRITON_INTERPRET=1, for tests."""
    fused_head: bool = False
    """Student's output layer and loss in one, in chunks of `chunk_tokens`, so that a row's logits are never whole: the
    memory of long rows. For topk_reverse_kl and sampled_reverse_kl with score.mode: separate."""


class ScoreConfig(_Section):
    mode: Literal["separate", "fused"] = "separate"
    """separate: the teacher's own forward pass in its own layout. fused: the teacher's stage runs beside the student's
    in one schedule; needs equal layouts."""


class TrainConfig(_Section):
    steps: Positive = 203
    """Optimizer steps."""
    prompts_per_step: Positive = 64
    """Prompts of one step, over all ranks."""
    answers_per_prompt: Positive = 4
    """Answers sampled for each prompt."""
    lr: float = Field(default=1.0e-6, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from lr to min_lr over `steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay (not on norms and biases)."""
    adam_beta1: Fraction = 0.9
    """Adam's first decay rate."""
    adam_beta2: Fraction = 0.95
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
    seed: int = 1234
    """Seeds sampling, shuffling and initialisation."""
    max_bad_steps: Positive = 3
    """Steps in a row with NaN or infinite loss or gradients after which the run stops; each such step is skipped."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose gradient norm exceeds this multiple of the running median; null for never."""
    watchdog_s: float = Field(default=1800.0, gt=0)
    """A step that takes longer writes every rank's stack to its log and ends the job. Outside steps, in an evaluation
    say, it is how long a rank waits for another one in a collective."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr: {self.lr}")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be below steps: {self.steps}")
        return self


class DataConfig(_Section):
    prompts: FilePath
    """JSONL (.jsonl) or Parquet (.parquet) file, or reasoning_gym:NAME."""
    prompt_key: str = "prompt"
    """Column of the prompt: text, or chat messages; dots reach into objects. A file without it is looked through for
    the columns that DAPO-Math-17K, AIME, AMC and HMMT use, and the choice is reported."""
    answer_key: str = "answer"
    """Column of the reference answer; dots reach into objects (reward_model.ground_truth). Known columns are found as
    for prompt_key."""
    source_key: str = "source"
    """Column that names the data set; missing is fine."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template. none: the text as it is."""
    thinking: bool | None = None
    """Passed to chat templates that have a thinking switch; null leaves their default."""
    system: str | None = None
    """System message put in front of chat prompts that bring none of their own."""
    suffix: str = ""
    """Instruction put behind every prompt's text."""
    verifier: str = "math"
    """Scores training answers for `prune.after_drift: grpo`; values as eval.sets.verifier."""
    tokenizer: FilePath | None = None
    """Directory or sentencepiece .model file; null takes the student's."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out and counted."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Prompts that repeat an earlier one's text are counted either way (DAPO-Math-17K holds each a hundred times)."""
    shuffle: bool = True
    """Shuffle by seed and epoch."""
    size: int = Field(default=10000, gt=0, le=10_000_000)
    """Prompts to draw from reasoning_gym:NAME."""
    seed: int = Field(default=0, ge=0)
    """Seed of reasoning_gym:NAME. Different seeds never draw the same item of its stream."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.template == "none" and (self.system is not None or self.thinking is not None):
            raise ValueError("system and thinking are for template: chat; remove them or set template: chat")
        return self


class EvalSetConfig(_Section):
    name: str = Field(pattern=r"^[\w.@-]+$")
    """Name in the metrics and of the answers' file: letters, digits and . @ _ -"""
    prompts: FilePath
    """As data.prompts."""
    verifier: str = Field(default="math", pattern=r"^(math|reasoning_gym|exact|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    """math: math-verify on the boxed answer. reasoning_gym: the data set's own scorer. exact: equal text.
    MODULE:FUNCTION: your own, called with (response, answer, metadata), returns a score from 0 to 1."""
    answers_per_prompt: Positive = 1
    """k of avg@k, pass@k and maj@k."""
    max_tokens: Positive = 31744
    """Cap on generated tokens, independent of the training budget."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling."""
    limit: Positive | None = None
    """Use only the first prompts; of reasoning_gym:NAME draw so many (null: 500)."""
    seed: int = Field(default=1, ge=0)
    """Seed of reasoning_gym:NAME; keep it different from data.seed."""
    prompt_key: str | None = None
    """As data.prompt_key; null takes that."""
    answer_key: str | None = None
    """As data.answer_key; null takes that."""
    suffix: str | None = None
    """As data.suffix; null takes that."""
    thinking: bool | None = None
    """As data.thinking; null takes that."""


class EvalConfig(_Section):
    every: int = Field(default=20, ge=0)
    """Evaluate after every so many steps; 0 for never."""
    at_start: bool = False
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    sets: list[EvalSetConfig] = Field(default_factory=list)
    """Data sets."""
    verifier_timeout_s: float = Field(default=10.0, gt=0)
    """A verifier that takes longer on one answer counts it wrong."""
    verifier_workers: Positive = 2
    """Processes that verify answers, on the first rank's machine."""
    save_answers: bool = True
    """Write every answer to RUN/eval/ as JSONL; an interrupted evaluation goes on from them."""
    chunk_answers: Positive = 1024
    """Answers generated between two writes of that file; an interruption loses at most so many."""
    seed: int = 0
    """Seed of evaluation's sampling."""


class CheckpointConfig(_Section):
    every: int = Field(default=20, ge=0)
    """Save after every so many steps; 0 saves at the end alone."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of run_dir. never: refuse a run_dir that has one."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of so many steps are kept for good; 0 for none."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    max_failures: Positive = 3
    """Failed saves in a row after which the run stops; it trains on until then."""


class Config(_Section):
    run_dir: FilePath = "runs/default"
    """Where metrics, logs, checkpoints and evaluations are written."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU. The CPU build runs on gloo."""
    student: ModelConfig
    """The model that learns."""
    teacher: TeacherConfig
    """The model that judges."""
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

    @property
    def loss_k(self) -> int:
        """Candidates per position of the top-k loss."""
        return self.loss.k or self.prune.k

    @property
    def candidates(self) -> int:
        """The student's most likely tokens that are kept at each position."""
        return max(self.prune.k, self.loss_k)

    @model_validator(mode="after")
    def _check(self) -> Config:
        problems = []
        if self.student.fp8_params and not self.train.distributed_optimizer:
            problems.append("student.fp8_params: true needs train.distributed_optimizer: true, which gathers them")
        if self.student.fp8_params and self.student.fp8_recipe == "mxfp8":
            problems.append(
                "student.fp8_params: true is not supported with fp8_recipe: mxfp8; set fp8_params: false or another "
                "recipe"
            )
        if self.score.mode == "fused":
            if self.student.parallel != self.teacher.parallel:
                problems.append("score.mode: fused needs student.parallel and teacher.parallel to be equal")
            if self.student.precision != self.teacher.precision:
                problems.append("score.mode: fused needs student.precision and teacher.precision to be equal")
            if self.teacher.offload:
                problems.append("score.mode: fused needs the teacher beside the student; set teacher.offload: false")
            if self.prune.in_flight:
                problems.append("score.mode: fused scores after generation; it excludes prune.in_flight: true")
            if self.prune.cut != "none":
                problems.append("score.mode: fused learns the drift point too late to cut; set prune.cut: none")
        full_vocabulary = ("full_reverse_kl", "forward_kl", "generalized_jsd")
        if self.loss.kind in full_vocabulary and self.score.mode != "fused":
            problems.append(
                f"loss.kind: {self.loss.kind} reads the teacher's whole distribution; set score.mode: fused"
            )
        if self.loss.fused_head and self.loss.kind in full_vocabulary:
            problems.append(
                f"loss.fused_head: true works with loss.kind: topk_reverse_kl or sampled_reverse_kl; {self.loss.kind} "
                "reads whole logits: set loss.fused_head: false"
            )
        if self.loss.fused_head and self.score.mode == "fused":
            problems.append(
                "loss.fused_head: true works with score.mode: separate; fused scoring compares whole logits of both "
                "models: set loss.fused_head: false"
            )
        if self.student.parallel.expert > 1 and self.rollout.engine == "megatron":
            problems.append(
                f"student.parallel.expert: {self.student.parallel.expert} spans replicas that generate for different "
                "numbers of tokens; set rollout.engine: vllm"
            )
        if self.teacher.parallel.expert > 1 and (self.prune.in_flight or self.prune.cut != "none"):
            problems.append(
                f"teacher.parallel.expert: {self.teacher.parallel.expert} spans replicas that score answers of "
                "different numbers of segments; set prune.in_flight: false and prune.cut: none, or expert: 1"
            )
        names = [s.name for s in self.eval.sets]
        if len(set(names)) != len(names):
            problems.append(f"eval.sets: names must differ, got {names}")
        if problems:
            raise ValueError("; ".join(problems))
        if self.student.precision == "bf16" and "sync_tolerance" not in self.rollout.model_fields_set:
            self.rollout.sync_tolerance = 1.0
        return self


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides (values are YAML) and validates the whole.

    Raises:
        ConfigError: every problem at once, with key, value and remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(values).__name__}")
    _resolve_paths(Config, values, str(Path(path).resolve().parent))
    for item in overrides or []:
        key, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"override {item!r} is not of the form key.path=value")
        _override(values, item, key.strip().split("."), yaml.safe_load(value))
    return parse_config(values)


def _override(values: dict[str, Any], item: str, path: list[str], value: Any) -> None:
    """Sets one key; a number in the path is a place in a list (eval.sets.0.limit)."""
    leaf: Any = values
    for depth, name in enumerate(path):
        if isinstance(leaf, list):
            if not name.isdigit() or int(name) >= len(leaf):
                where = ".".join(path[:depth])
                raise ConfigError(f"override {item!r}: {where} is a list of {len(leaf)}; name a place from 0 on")
            place: Any = int(name)
        elif isinstance(leaf, dict):
            place = name
        else:
            raise ConfigError(f"override {item!r}: {'.'.join(path[:depth])} is a value, not a section")
        if depth == len(path) - 1:
            leaf[place] = value
        elif isinstance(leaf, list):
            leaf = leaf[place]
        else:
            leaf = leaf.setdefault(place, {})


def parse_config(values: dict[str, Any]) -> Config:
    """Validates a tree of values; relative paths are relative to the current directory. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_describe(e) for e in error.errors()]
        raise ConfigError(f"{len(lines)} problem(s) in the config:\n" + "\n".join(f"  {x}" for x in lines)) from None


def dump_config(config: Config) -> str:
    """The whole config as YAML, defaults included; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def all_keys() -> dict[str, str]:
    """Every key's full path and its documentation."""
    found: dict[str, str] = {}

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            found[prefix + name] = field.description or ""
            inner = _section_of(field.annotation)
            if inner:
                walk(inner, f"{prefix}{name}.")

    walk(Config, "")
    return found


def _section_of(annotation: Any) -> type[_Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, _Section):
            return candidate
    return None


def _resolve_paths(section: type[BaseModel], values: Any, directory: str) -> None:
    """Makes the paths of a YAML file absolute, before overrides that are relative to elsewhere join them."""
    if isinstance(values, list):
        for value in values:
            _resolve_paths(section, value, directory)
    if not isinstance(values, dict):
        return
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        inner = _section_of(field.annotation)
        if inner:
            _resolve_paths(inner, values[name], directory)
        elif any(getattr(m, "func", None) is _absolute for m in _metadata(field)):
            _Base.directory = directory
            try:
                values[name] = _absolute(values[name])
            finally:
                _Base.directory = "."


def _metadata(field: Any) -> list[Any]:
    found = list(field.metadata)
    for argument in getattr(field.annotation, "__args__", ()):
        found += getattr(argument, "__metadata__", ())
    return found


def _describe(error: Any) -> str:
    path = ".".join(str(x) for x in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, all_keys(), n=1, cutoff=0.5)
        leaf = error["loc"][-1]
        same = [k for k in all_keys() if k.split(".")[-1] == leaf]
        hint = same[0] if same else (near[0] if near else None)
        return f"{path}: unknown key" + (f"; did you mean {hint}?" if hint else "")
    if error["type"] == "missing":
        return f"{path}: required key is missing ({all_keys().get(path, '')})"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
    return f"{path}: {message}{shown}"
