"""Student and teacher: model, layout, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_opd.config.base import Count, FilePath, OwnPart, Positive, Section
from megatron_opd.plugins import is_own


class ParallelConfig(Section):
    tensor: Positive = 1
    """Tensor-parallel size. Must divide attention heads, key/value groups and the feed-forward width."""
    pipeline: Positive = 1
    """Pipeline-parallel size. Must divide the number of layers (times `virtual_pipeline`)."""
    virtual_pipeline: Positive = 1
    """Model chunks per pipeline stage; above 1 the interleaved schedule runs. Student only."""
    context: Positive = 1
    """Context-parallel size: each sequence's tokens are shared out over so many ranks, in training and in the teacher's
    pass over whole responses. Generation and scoring in flight use these ranks as further data-parallel ones."""
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


class ModelConfig(Section):
    model: FilePath
    """A Hugging Face directory, or one made by `tools/convert.py import`."""
    family: OwnPart | None = None
    """null: by config.json's model_type, one of llama, qwen2, qwen3 and qwen3_moe. MODULE:NAME: your own, a
    megatron_opd.weights.families.Family."""
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
    fp8_bf16_ends: Count = 0
    """Number of layers at each end of the model that stay in bf16. Not with fp8_recipe: delayed."""
    implementation: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation. auto: Transformer Engine on GPUs (an error if it is missing), local without a GPU and with
    precision: fp32, for which Transformer Engine has no fused attention."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass. selective repeats attention alone: little is saved where it is
    fused, as Transformer Engine's is."""
    allow_pickle: bool = False
    """Accept pickled weights (`pytorch_model.bin`). A pickle file can run any code on load."""

    @field_validator("family")
    @classmethod
    def _own_family(cls, value: str | None) -> str | None:
        if value is not None and not is_own(value):
            raise ValueError("must be null (the family is that of config.json's model_type) or your own as MODULE:NAME")
        return value

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
    cache_gib: float | None = Field(default=None, gt=0)
    """Most GiB that the teacher's keys and values of running responses take on a rank, where it reads in segments; what
    does not fit waits in host memory for its turn. null: what the responses' tokens take."""
    system: str | None = None
    """System message that the teacher reads, in place of data.system and of a system message in the prompt."""
    context_key: str | None = None
    """Column of a text that the teacher alone reads, the reference solution, say; dots reach into objects."""
    context: str = "{context}\n\n{prompt}"
    """How that text and the student's last message become the teacher's. The response follows the teacher's prompt as
    it follows the student's, token for token."""

    @property
    def reads_another_prompt(self) -> bool:
        """Whether the teacher's prompts differ from the student's."""
        return self.system is not None or self.context_key is not None

    @field_validator("context")
    @classmethod
    def _both_texts(cls, value: str) -> str:
        if "{context}" not in value or "{prompt}" not in value:
            raise ValueError("must hold both {context} and {prompt}")
        return value

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


class NamedTeacherConfig(TeacherConfig):
    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """What metrics and messages call it."""
    sources: list[str] = Field(min_length=1)
    """It judges the prompts with these sources (data.source_key); `teacher` judges the others."""
