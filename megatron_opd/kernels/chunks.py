"""Logits in full precision, a chunk of tokens at a time: what the torch paths are built from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one full-precision chunk. A CPU wants the chunk to stay in its cache; a GPU wants few, large kernels.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_GPU = 2**24


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that sums run in: float32, or float64 where the logits are float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def full_precision_chunks(
    logits: Tensor, dtype: torch.dtype, chunk_tokens: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `logits` and their copy in `dtype`, chunk after chunk.

    The copy may be overwritten; its memory is used again for the next chunk. `chunk_tokens` None picks a size by the
    width of a row and the device.
    """
    if chunk_tokens is None:
        budget = _CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        chunk_tokens = max(1, budget // max(1, logits.shape[1]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    tokens, columns = logits.shape
    if columns == 0:
        return
    buffer = torch.empty((min(chunk_tokens, tokens), columns), dtype=dtype, device=logits.device)
    for start in range(0, tokens, chunk_tokens):
        span = slice(start, min(start + chunk_tokens, tokens))
        yield span, buffer[: span.stop - start].copy_(logits[span])
