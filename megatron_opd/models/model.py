"""A student or teacher as one rank holds it: its chunks, layout, names and the shape of its rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_opd.compat.gpt_model import GPTModel
from megatron_opd.kernels import VocabShard
from megatron_opd.models.fp8 import drop_fp8_copies, token_block
from megatron_opd.models.packed import PackedRow, pack_row
from megatron_opd.parallel.context import padded_length
from megatron_opd.parallel.groups import Layout
from megatron_opd.weights.bridge import ModelBridge


@dataclass
class Model:
    """A model as this rank holds it. What loads, exports, checkpoints, trains or runs one takes this object."""

    name: str  # student, teacher or reference
    chunks: list[GPTModel]  # one, or one per virtual pipeline stage
    config: TransformerConfig
    layout: Layout
    bridge: ModelBridge  # names and tensor formats of its family
    vocab_size: int  # of the tokenizer: what lies beyond is padding
    padded_vocab_size: int
    device: torch.device
    transformer_engine: bool
    terminators: tuple[int, ...] = ()  # a teacher's, whose joint log-prob is part of its scores (loss.stop: event)
    offload: bool = False  # parameters live in host memory outside `resident`
    cache_gib: float | None = None  # a teacher's: most that the keys and values of running responses take on a rank
    _moved_s: float = 0.0
    _host: list[torch.Tensor] = field(default_factory=list)  # with `offload`: pinned copies of what is on the device

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The parameters are on the device inside; with `teacher.offload` they go back to host memory afterwards."""
        if self.offload:
            self._enter_device()
        try:
            yield
        finally:
            if self.offload:
                self.leave_device()
                drop_fp8_copies(self.chunks)
                torch.cuda.empty_cache()

    @property
    def vocab_shard(self) -> VocabShard:
        """The part of the vocabulary that this rank's logits cover."""
        return VocabShard.of(self.layout.groups.tp, self.padded_vocab_size, self.vocab_size)

    @property
    def groups(self) -> ProcessGroupCollection:
        """The process groups of its layout."""
        return self.layout.groups

    def leave_device(self) -> None:
        """Parameters and buffers lie in pinned host memory afterwards. The teacher's never change, so that only the
        first time copies them: later, what is on the device is let go."""
        start = time.monotonic()
        tensors = [t for chunk in self.chunks for t in (*chunk.parameters(), *chunk.buffers())]
        if not self._host:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t.data) for t in tensors]
        for tensor, host in zip(tensors, self._host, strict=True):
            tensor.data = host
        self._moved_s += time.monotonic() - start

    def _enter_device(self) -> None:
        start = time.monotonic()
        tensors = [t for chunk in self.chunks for t in (*chunk.parameters(), *chunk.buffers())]
        for tensor, host in zip(tensors, self._host, strict=True):
            tensor.data = host.to(self.device, non_blocking=True)  # the host waits for none of the copies
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # for the time that it took, once a step
        self._moved_s += time.monotonic() - start

    def take_moved_seconds(self) -> float:
        """Seconds that its parameters were on their way between host and device since the last call."""
        seconds, self._moved_s = self._moved_s, 0.0
        return seconds

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this: sequence parallelism splits them evenly, FP8 wants whole blocks."""
        split = self.layout.parallel.tensor if self.config.sequence_parallel else 1
        split *= 2 * self.layout.parallel.context if self.layout.parallel.context > 1 else 1
        return split * token_block(self.config)

    def row(self, lengths: list[int], multiple: int = 1) -> tuple[PackedRow, int]:
        """A row of whole sequences for this model (this rank's part under context parallelism, where each sequence is
        padded to split evenly), and its tokens, those of all context-parallel ranks, with padding (a last sequence of
        its own) to a multiple of `row_multiple` and of `multiple`."""
        context = self.layout.context
        lengths = [padded_length(n, context[1]) for n in lengths]
        tokens = sum(lengths)
        padding = -tokens % math.lcm(self.row_multiple, multiple)
        lengths = [*lengths, padding] if padding else lengths
        return pack_row(lengths, self.device, self.transformer_engine, context), tokens + padding
