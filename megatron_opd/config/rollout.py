"""Generation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import Count, EngineName, FilePath, Positive, Seconds, Section
from megatron_opd.plugins import is_own

VLLM_KEYS = (
    "mode",
    "tensor",
    "gpu_memory_utilization",
    "cpu_cache_mb",
    "enforce_eager",
    "max_model_len",
    "servers",
    "api_key_env",
    "server_timeout_s",
    "server_retries",
    "transfer",
    "transfer_dir",
)  # lay in `rollout` itself


class VllmConfig(Section):
    mode: Literal["colocate", "server"] = "colocate"
    """colocate: engines inside the training ranks. server: `vllm serve` processes at `servers`."""
    tensor: Positive = 1
    """Tensor-parallel size of one engine."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0.0, le=1.0)
    """Share of GPU memory that a colocated engine may use."""
    cpu_cache_mb: Positive = 512
    """Without a GPU: key/value cache of a colocated engine."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation in colocated engines; slower, but ready sooner. Always so without a GPU.
    Servers take vLLM's own --enforce-eager."""
    max_model_len: Positive | None = None
    """Longest prompt plus response; null takes what the config can reach."""
    servers: list[str] = Field(default_factory=list)
    """vLLM servers as http://HOST:PORT, one per replica."""
    api_key_env: str = Field(default="MEGATRON_OPD_VLLM_API_KEY", min_length=1)
    """Environment variable that holds the servers' API key; unset means none is sent."""
    server_timeout_s: Seconds = 600.0
    """A request without a reply for this long counts as failed and goes to another replica."""
    server_retries: int = Field(default=5, ge=0, le=100)
    """Attempts per request after the first, with doubling back-off."""
    transfer: Literal["auto", "nccl", "ipc", "file"] = "auto"
    """How parameters reach the engines. auto: CUDA IPC or NCCL on GPUs, shared memory or the file system without."""
    transfer_dir: FilePath | None = None
    """Directory for `transfer: file` that servers can read; null takes /dev/shm on one node."""


class RolloutConfig(Section):
    renamed: ClassVar[dict[str, str]] = {name: f"vllm.{name}" for name in VLLM_KEYS}

    engine: EngineName = "megatron"
    """megatron: inside the training ranks, needs nothing else. vllm: what a cluster uses. MODULE:NAME: your own, a
    subclass of megatron_opd.rollout.base.RolloutEngine."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Options of an engine of your own, given to it by keyword."""
    temperature: float = Field(default=1.0, ge=0.0)
    """Sampling temperature; 0 is greedy. The method uses 1.0."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; 1.0 is off."""
    top_k: Count = 0
    """Sample among the k most likely tokens; 0 is off."""
    max_batch: Positive = 256
    """Responses in generation at once per data- and context-parallel rank (or vLLM engine); the others wait for a free
    slot."""
    cache_gib: float | None = Field(default=None, gt=0)
    """engine: megatron: most GiB that keys and values take on a rank; a request waits until prompt and longest response
    fit. null: what the running responses' tokens take."""
    bucket_mb: Positive = 512
    """Parameters are gathered and handed over in buckets of at most this size."""
    sync_tolerance: float | None = Field(default=None, gt=0)
    """Largest gap (nats) between the engine's and the trainer's log-probs on the probe prompt after a hand-over. null:
    0.02, and 1.0 where `student.precision` is bf16, whose logits of 16 to 32 are 0.125 apart."""
    gap_threshold: float = Field(default=0.5, gt=0)
    """A sampled token whose rollout and student log-probs differ by more (nats) is counted in the metrics."""
    importance_clip: float | None = Field(default=None, gt=0)
    """Truncated importance weights min(p_student / p_rollout, clip) on the loss; null for none."""
    carry_over: Literal["off", "finished"] = "off"
    """finished: more responses are under way than a step trains on; it trains on the first that have ended, and the
    others go on in the next step. off: a step waits for its longest response."""
    oversubscribe: float | None = Field(default=None, ge=1.0, le=16.0)
    """carry_over: finished: responses under way, in steps' worth. null: 1.5. 1.0: what a step trains on, as without."""
    max_version_lag: Positive = 4
    """carry_over: finished: a token is trained on at most so many optimizer steps after the parameters that sampled it;
    a step waits for the responses that would come later."""
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    """What `engine: vllm` alone has."""

    def tolerance(self, precision: Literal["fp32", "bf16"]) -> float:
        """`sync_tolerance` for a student of this precision, in nats."""
        if self.sync_tolerance is not None:
            return self.sync_tolerance
        return 1.0 if precision == "bf16" else 0.02

    @property
    def oversubscription(self) -> float:
        """`oversubscribe`, or its default."""
        return 1.5 if self.oversubscribe is None else self.oversubscribe

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.engine == "vllm" and self.vllm.mode == "server" and not self.vllm.servers:
            raise ValueError("vllm.mode: server needs vllm.servers: [http://HOST:PORT, ...]")
        if self.engine != "vllm" and self.vllm.mode == "server":
            raise ValueError(f"vllm.mode: server needs engine: vllm; engine: {self.engine} has no servers")
        if self.carry_over == "finished" and is_own(self.engine):
            raise ValueError(
                f"carry_over: finished has the engine go on behind tokens that are there; engine: {self.engine} is "
                "your own: set engine: megatron or vllm, or carry_over: off"
            )
        if self.carry_over == "off" and self.oversubscribe is not None:
            raise ValueError(f"oversubscribe: {self.oversubscribe} is of carry_over: finished alone; set it, or null")
        if self.oversubscription > self.max_version_lag + 1:
            raise ValueError(
                f"oversubscribe: {self.oversubscription} keeps responses waiting for more steps than max_version_lag: "
                f"{self.max_version_lag}; set oversubscribe: {self.max_version_lag + 1} or less"
            )
        return self
